from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import braceexpand
import pyarrow.parquet as pq
import pytest

from capfilt.data.sample import SOURCES
from capfilt.reporting import collect, page


def data_of(path: Path) -> dict[str, Any]:
    """What the page's script reads."""
    (island,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', path.read_text("utf-8"))
    found: dict[str, Any] = json.loads(island)
    return found


def test_a_bootstrap_ends_with_its_page(finished_run: Path) -> None:
    assert (finished_run / "report.html").is_file()
    (look,) = data_of(finished_run / "report.html")["looks"]
    assert look["round"] == 1
    assert look["totals"] == {"web": 60, "synthetic": 60}


def test_the_page_decides_as_the_policy_did(colours: Path) -> None:
    """Every text of the page, by the scores and the threshold that are in it, as dataset/*.parquet has it."""
    import numpy as np

    data = data_of(colours / "report.html")
    (look,) = data["looks"]
    texts = look["texts"]
    scores = [float(np.float32(score)) for score in texts[look["score"]]]
    keys = [data["images"][image][0] for image in texts["image"]]
    page = {
        (key, SOURCES[source], text): score >= look["threshold"] and fixed < 0
        for key, source, text, score, fixed in zip(
            keys, texts["source"], texts["text"], scores, texts["fixed"], strict=True
        )
    }
    verdicts = pq.read_table(colours / "round-1/dataset/00000.parquet").to_pylist()
    assert page == {(row["key"], row["source"], row["text"]): row["verdict"] == "kept" for row in verdicts}
    assert 0 < sum(page.values()) < len(page)


def test_the_truth_and_the_figures_are_the_summary_s(colours: Path) -> None:
    (look,) = data_of(colours / "report.html")["looks"]
    told = json.loads((colours / "summary.json").read_text())["rounds"][1]["filter"]
    texts = look["texts"]
    known = [i for i, truth in enumerate(texts["truth"]) if truth >= 0]
    assert len(known) == 64
    kept = [i for i in known if texts["itm"][i] >= look["threshold"]]
    right = [i for i in known if texts["truth"][i]]
    both = set(kept) & set(right)
    assert len(both) / len(kept) == pytest.approx(told["precision"])
    assert len(both) / len(right) == pytest.approx(told["recall"])


def test_its_command_writes_what_the_round_wrote(colours: Path, tmp_path: Path, capfilt: Any) -> None:
    import shlex

    (look,) = data_of(colours / "report.html")["looks"]
    words = shlex.split(look["select"])
    assert words[0] == "capfilt"
    policy = ("--score", look["score"], "--threshold", repr(look["threshold"]))
    done = capfilt(*words[1:], "--out", tmp_path / "again", *policy)
    assert done.code == 0, done.err
    made = (colours / "round-1/dataset/00000.tar").read_bytes()
    assert (tmp_path / "again/dataset/00000.tar").read_bytes() == made


def test_what_to_do_next_is_three_commands_that_work(run_copy: Path, capfilt: Any) -> None:
    import shlex

    summary = json.loads((run_copy / "summary.json").read_text())
    steps = collect.next_steps(run_copy, summary)
    verbs = [shlex.split(command)[1] for _, command in steps]
    assert verbs == ["review", "select", "export"]
    for _, command in steps[1:]:
        done = capfilt(*shlex.split(command)[1:])
        assert done.code == 0, (command, done.err)
    alone = {**summary, "rounds": summary["rounds"][:1]}
    assert [shlex.split(command)[1] for _, command in collect.next_steps(run_copy, alone)] == ["export"]


def test_the_end_of_a_bootstrap_says_so(run_copy: Path, finished_run: Path, capfilt: Any) -> None:
    done = capfilt("bootstrap", finished_run.parent / "mine.yaml", "--out", run_copy)
    assert done.code == 0, done.err
    assert f"report      {run_copy}/report.html" in done.out
    assert f"  capfilt review {run_copy}\n" in done.out
    as_json = capfilt("bootstrap", finished_run.parent / "mine.yaml", "--out", run_copy, "--json")
    json.loads(as_json.out)


def test_a_run_that_is_not_finished_has_a_page(run_copy: Path, capfilt: Any) -> None:
    for gone in ("summary.json", "report.html"):
        (run_copy / gone).unlink()
    shutil.rmtree(run_copy / "round-1/dataset")
    log = [line for line in (run_copy / "log.jsonl").read_text().splitlines() if '"round": 1, "seconds"' not in line]
    (run_copy / "log.jsonl").write_text("\n".join(log) + '\n{"ts": "cut sh')
    done = capfilt("report", run_copy, "--json", address=None)
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert (told["rounds"], told["texts"]) == (1, 120)
    assert told["bytes"] == (run_copy / "report.html").stat().st_size


def test_other_runs_have_pages_too(finished_run: Path, annotated: Path, tmp_path: Path, capfilt: Any) -> None:
    for folder, texts in ((annotated, 120), (tmp_path / "clean", 120)):
        if folder != annotated:
            words = ("--annotations", annotated, "--out", folder, "--set", "threshold=keep-rate")
            assert capfilt("select", finished_run / "data/web", *words).code == 0
        done = capfilt("report", folder, "--json", "--out", tmp_path / "page.html", address=None)
        assert done.code == 0, done.err
        assert json.loads(done.out)["texts"] == texts
        data = data_of(tmp_path / "page.html")
        assert all(thumb for _, thumb in data["images"])
        assert data["looks"][0]["select"] == f"capfilt select {finished_run / 'data/web'} --annotations {annotated}"


def test_a_select_that_ranks_says_so_and_its_command_runs(
    finished_run: Path, annotated: Path, tmp_path: Path, capfilt: Any
) -> None:
    import shlex

    words = ("--annotations", annotated, "--set", "top_k=1", "--set", "rank=itm", "--out", tmp_path / "best")
    assert capfilt("select", finished_run / "data/web", *words).code == 0
    assert capfilt("report", tmp_path / "best").code == 0
    html = (tmp_path / "best/report.html").read_text("utf-8")
    assert "<b>policy</b><strong>the 1 best by itm</strong>" in html
    (look,) = data_of(tmp_path / "best/report.html")["looks"]
    assert (look["score"], look["threshold"]) == ("itm", 0.0)
    policy = ("--score", look["score"], "--threshold", repr(look["threshold"]))
    done = capfilt(*shlex.split(look["select"])[1:], "--out", tmp_path / "again", *policy)
    assert done.code == 0, done.err
    made = (tmp_path / "best/dataset/00000.tar").read_bytes()
    assert (tmp_path / "again/dataset/00000.tar").read_bytes() == made


POLICIES: list[tuple[str, list[str]]] = [
    ("either", ["score=itm", "threshold=0.5", "other_threshold=0.02", "combine=or"]),
    ("both", ["score=itm", "threshold=0.3", "other_threshold=0.02"]),
    ("fused", [
        "score=fused", "fused={itc: 1, entropy: 0.5}", "threshold=keep-rate", "keep_rate_of=web", "keep_rate=0.4",
        "conditions=[{score: entropy, min: 1}]", "rules.min_words=3", "sources=[web, synthetic]",
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "sets"), POLICIES, ids=[name for name, _ in POLICIES])
def test_a_page_decides_as_a_policy_by_several_scores_and_its_command_writes_the_same(
    name: str, sets: list[str], finished_run: Path, annotated: Path, tmp_path: Path, capfilt: Any
) -> None:
    import shlex

    shards, out = finished_run / "data/web", tmp_path / name
    assert capfilt("annotate", shards, "--out", annotated, "--add-score", "entropy").code == 0
    words = (word for each in sets for word in ("--set", each))
    assert capfilt("select", shards, "--annotations", annotated, "--out", out, *words).code == 0
    assert capfilt("report", out).code == 0
    (look,) = data_of(out / "report.html")["looks"]
    score, texts = sets[0].removeprefix("score="), look["texts"]
    assert (look["score"], [*look["ranges"]]) == (score, [score]), "the page moves this one alone"
    verdicts = [row for path in (out / "dataset").glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    kept = sum(row["verdict"] == "kept" for row in verdicts)
    decided = [fixed == -2 or (fixed == -1 and value is not None and value >= look["threshold"] - 1e-9)
               for fixed, value in zip(texts["fixed"], texts[score], strict=True)]  # fmt: skip
    assert 0 < sum(decided) == kept < len(decided)
    lower = ("--score", score, "--threshold", repr(look["threshold"]))
    done = capfilt(*shlex.split(look["select"])[1:], "--out", tmp_path / "again", *lower)
    assert done.code == 0, done.err
    assert (tmp_path / "again/dataset/00000.tar").read_bytes() == (out / "dataset/00000.tar").read_bytes()


def test_a_share_over_shards_of_dotted_names(finished_run: Path, annotated: Path, tmp_path: Path, capfilt: Any) -> None:
    """`laion.00000.tar` is annotated as laion.00000, which no part of the page may cut again."""
    (tmp_path / "web").mkdir()
    shutil.copy(finished_run / "data/web/00000.tar", tmp_path / "web/laion.00000.tar")
    (tmp_path / "a/annotations").mkdir(parents=True)
    shutil.copy(annotated / "annotations/00000.parquet", tmp_path / "a/annotations/laion.00000.parquet")
    words = ("--annotations", tmp_path / "a", "--out", tmp_path / "clean", "--keep-rate", 0.4)
    assert capfilt("select", tmp_path / "web", *words).code == 0
    done = capfilt("report", tmp_path / "clean")
    assert done.code == 0, done.err
    (look,) = data_of(tmp_path / "clean/report.html")["looks"]
    assert look["totals"] == {"web": 20, "synthetic": 20}


def test_the_command_of_many_shards_is_short_and_names_them_all() -> None:
    urls = [f"s3://bucket/web/{number:05d}.tar" for number in range(20_000) if number != 7]
    urls += [f"s3://bucket/plain/{number}.tar" for number in range(1, 12)]
    urls += ["s3://bucket/more/part-1.tar", "s3://bucket/more/part-{2}.tar", "s3://bucket/more/10.tar.bz2"]
    named = collect._in_braces(urls)
    assert set(named) == {
        "s3://bucket/more/10.tar.bz2",
        "s3://bucket/more/part-1.tar",
        "s3://bucket/more/part-{2}.tar",
        "s3://bucket/plain/{1..9}.tar",
        "s3://bucket/plain/{10..11}.tar",
        "s3://bucket/web/{00000..00006}.tar",
        "s3://bucket/web/{00008..19999}.tar",
    }
    expanded = [url for name in named for url in ([name] if "{2}" in name else braceexpand.braceexpand(name))]
    assert sorted(expanded) == sorted(urls)


@pytest.mark.parametrize("sizes", [{"a": 2}, {"a": 2, "b": 1}])
def test_shards_of_whole_folders_are_named_by_these(tmp_path: Path, sizes: dict[str, int]) -> None:
    urls = [str(tmp_path / folder / f"{number}.tar") for folder, size in sizes.items() for number in range(size)]
    for url in urls:
        Path(url).parent.mkdir(exist_ok=True)
        Path(url).touch()
    assert collect._by_folder(urls) == [str(tmp_path / folder) for folder in sizes]
    assert collect._by_folder(urls[1:]) == urls[1:]


@pytest.fixture(scope="module")
def annotated(finished_run: Path, tmp_path_factory: pytest.TempPathFactory, capfilt: Any) -> Path:
    """The run folder of `capfilt annotate` over the finished run's web, with its models."""
    out = tmp_path_factory.mktemp("annotated") / "a"
    models = ("--captioner", finished_run / "round-1/captioner", "--filter", finished_run / "round-1/filter")
    done = capfilt("annotate", finished_run / "data/web", *models, "--out", out, "--set", "decode.max_length=12")
    assert done.code == 0, done.err
    return out


def test_shards_that_are_gone_are_said_to_be(run_copy: Path, capfilt: Any) -> None:
    shutil.rmtree(run_copy / "data/web")
    done = capfilt("report", run_copy, address=None)
    assert done.code == 0, done.err
    page = (run_copy / "report.html").read_text("utf-8")
    assert "No pictures and no truth: no shard found at" in page
    assert all(thumb is None for _, thumb in data_of(run_copy / "report.html")["images"])


@pytest.mark.parametrize(
    ("held", "code", "said"), [(False, 2, "is no run folder"), (True, 1, "holds nothing to show yet")]
)
def test_what_has_no_page(tmp_path: Path, capfilt: Any, held: bool, code: int, said: str) -> None:
    if held:
        (tmp_path / "plan.json").write_text('{"captioner": {}}')
        (tmp_path / "recipe.yaml").write_text("rounds: 1\n")
    done = capfilt("report", tmp_path, address=None)
    assert done.code == code
    assert said in done.line
    assert not (tmp_path / "report.html").exists()


def test_the_page_s_script_knows_every_source() -> None:
    assert f"const SOURCES = {json.dumps(SOURCES)}" in (page.TEMPLATES / "dom.js").read_text()
