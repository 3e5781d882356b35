from __future__ import annotations

import hashlib
import io
import json
import shutil
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import capfilt.data.annotations as tables
from capfilt.api.progress import progress_of
from capfilt.data import shards
from capfilt.data.annotations import Annotation
from capfilt.data.sample import Sample
from capfilt.models.checkpoints import store
from capfilt.runs.ledger import fingerprint
from capfilt.stages import workload
from capfilt.stages.runner import CommandOptions

SCORES = {"a": (0.9, 0.1), "b": (0.5, 0.4), "c": (0.4999, 0.9), "d": (0.2, -0.3)}
"""(itm, itc) of each key's web text; its synthetic text has them the other way round, folded into range."""


def sample(key: str) -> Sample:
    return Sample(key, f"the bytes of {key}".encode(), "jpg", f"web {key}", {"url": f"https://x.invalid/{key}"})


def row(key: str, source: str, itm: float | None, itc: float | None, **more: Any) -> Annotation:
    own = sample(key)
    values: dict[str, Any] = {"captioner": "", "filter": "blip-1", "seed": 0, "round": 3, **more}
    return Annotation(key, own.uid, own.sha256, source, 0, f"{source} {key}", itm, itc, **values)


@pytest.fixture
def annotated(tmp_path: Path) -> Path:
    """Two shards and their annotations; no picture is looked at, so the bytes need be none."""
    shards.write(tmp_path / "web/00000.tar", [sample("a"), sample("b")])
    shards.write(tmp_path / "web/00001.tar", [sample("c"), sample("d"), sample("e")])
    result = [
        written
        for key, (itm, itc) in SCORES.items()
        for written in (row(key, "web", itm, itc), row(key, "synthetic", abs(itc), itm))
    ]
    broken = row("e", "web", None, None, status="failed", reason="truncated image")
    tables.write(tmp_path / "a/annotations/00000.parquet", result[:4])
    tables.write(tmp_path / "a/annotations/00001.parquet", [*result[4:], broken])
    return tmp_path


def kept(run: Path) -> dict[str, list[str]]:
    result = {}
    for url in shards.expand(str(run / "dataset")):
        for item in shards.read(url):
            assert isinstance(item, Sample)
            assert item.image == sample(item.key).image
            result[item.key] = [caption["text"] for caption in item.meta["captions"]]
    return result


@pytest.mark.parametrize(
    ("policy", "expected", "threshold"),
    [
        # The paper's: P(match) of 0.5, web and synthetic texts independently; reaching it is enough.
        (["threshold=0.5"], {"a": ["web a"], "b": ["web b"], "c": ["synthetic c"]}, 0.5),
        (
            ["threshold=0.4", "score=itc"],
            {"a": ["synthetic a"], "b": ["synthetic b", "web b"], "c": ["synthetic c", "web c"]},
            0.4,
        ),
        # Three of eight texts, whichever source they are from.
        (["threshold=keep-rate", "keep_rate=0.375"], {"a": ["web a"], "b": ["web b"], "c": ["synthetic c"]}, 0.5),
        (["threshold=keep-rate", "keep_rate=0.25"], {"a": ["web a"], "c": ["synthetic c"]}, 0.9),
    ],
)
def test_texts_are_kept_that_reach_the_threshold(
    annotated: Path, capfilt: Any, policy: list[str], expected: dict[str, list[str]], threshold: float
) -> None:
    words = [word for assignment in policy for word in ("--set", assignment)]
    out = annotated / "clean"
    done = capfilt("select", annotated / "web", "--annotations", annotated / "a", "--out", out, *words, "--json")
    assert done.code == 0, done.err
    answer = json.loads(done.out)
    assert answer["threshold"] == pytest.approx(threshold, abs=1e-5)
    assert kept(out) == expected
    count = Counter(text.split()[0] for texts in expected.values() for text in texts)
    assert answer["texts"]["kept"] == count
    assert answer["samples"] == {"in": 5, "kept": len(expected), "dropped": 4 - len(expected), "failed": 1}
    assert answer["failed"] == {"truncated image": 1}
    sizes = json.loads((out / "dataset/sizes.json").read_text())
    assert sizes == {"00000.tar": len(expected.keys() & {"a", "b"}), "00001.tar": len(expected.keys() & {"c", "d"})}


@pytest.mark.parametrize(
    ("policy", "texts"),
    [
        (["threshold=0.4", "score=itc"], {"a": "synthetic a", "b": "synthetic b", "c": "web c"}),
        (["threshold=0.39"], {"a": "web a", "b": "web b", "c": "synthetic c"}),
        (["threshold=0.39", "top_k=2"], {"a": "web a", "b": "synthetic b", "c": "web c"}),
        (["threshold=0.39", "top_k=2", "rank=itm"], {"a": "web a", "b": "web b", "c": "synthetic c"}),
    ],
)
def test_the_txt_is_the_best_kept_text(annotated: Path, capfilt: Any, policy: list[str], texts: dict[str, str]) -> None:
    words = [word for assignment in policy for word in ("--set", assignment)]
    done = capfilt("select", annotated / "web", "--annotations", annotated / "a", "--out", annotated / "clean", *words)
    assert done.code == 0, done.err
    urls = shards.expand(str(annotated / "clean/dataset"))
    result = [item for url in urls for item in shards.read(url) if isinstance(item, Sample)]
    assert {sample.key: sample.text for sample in result} == texts


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        # BLIP-2's: the best texts by itc, no threshold.
        (["top_k=1"], {"a": ["synthetic a"], "b": ["synthetic b"], "c": ["web c"], "d": ["synthetic d"]}),
        (["top_k=1", "threshold=0.5"], {"a": ["web a"], "b": ["web b"], "c": ["synthetic c"]}),
        # Web if it passes, else synthetic.
        (["keep=web-first", "threshold=0.4"], {"a": ["web a"], "b": ["web b"], "c": ["web c"]}),
        (["keep=best-of"], {"a": ["web a"], "b": ["web b"], "c": ["synthetic c"]}),
        # The better one of both.
        (
            ["keep=best", "threshold=0.1"],
            {"a": ["synthetic a"], "b": ["synthetic b"], "c": ["web c"], "d": ["synthetic d"]},
        ),
        (["other_threshold=0.3"], {"b": ["web b"], "c": ["synthetic c"]}),
        (
            ["other_threshold=0.85", "combine=or"],
            {"a": ["synthetic a", "web a"], "b": ["web b"], "c": ["synthetic c", "web c"]},
        ),
    ],
)
def test_other_policies(annotated: Path, capfilt: Any, policy: list[str], expected: dict[str, list[str]]) -> None:
    words = [word for assignment in policy for word in ("--set", assignment)]
    out = annotated / "clean"
    done = capfilt("select", annotated / "web", "--annotations", annotated / "a", "--out", out, *words, "--json")
    assert done.code == 0, done.err
    assert kept(out) == expected
    rows = [row for path in (out / "dataset").glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    assert len(rows) == 9
    assert all(bool(row["why"]) == (row["verdict"] != "kept") for row in rows), "a verdict without its reason"
    assert ("threshold" in json.loads(done.out)) == (policy != ["top_k=1"])


def test_why_each_text_went_stays_known(annotated: Path, capfilt: Any) -> None:
    blank = replace(row("d", "synthetic", 0.99, 0.9), text=" ")
    unscored = replace(row("d", "web", 0.99, 0.9), itm=None)
    others = list(tables.rows(tables.read(annotated / "a/annotations/00001.parquet")))
    tables.write(annotated / "a/annotations/00001.parquet", [*(r for r in others if r.key != "d"), blank, unscored])
    done = capfilt("select", annotated / "web", "--annotations", annotated / "a", "--out", annotated / "clean")
    assert done.code == 0, done.err
    result = pq.read_table(annotated / "clean/dataset/00001.parquet").to_pylist()
    assert {(r["key"], r["source"]): (r["verdict"], r["why"]) for r in result} == {
        ("c", "web"): ("dropped", "itm below threshold"),
        ("c", "synthetic"): ("kept", ""),
        ("d", "web"): ("dropped", "no itm score"),
        ("d", "synthetic"): ("dropped", "no text"),
        ("e", "web"): ("failed", "truncated image"),
    }
    assert result[0].keys() == {*tables.SCHEMA.names, "verdict", "why"}


def test_a_new_threshold_needs_the_scores_alone(finished_run: Path, tmp_path: Path, capfilt: Any) -> None:
    """The annotations of a round serve any policy; with the round's own, the same shards come out."""
    threshold = json.loads((finished_run / "summary.json").read_text())["rounds"][1]["filter"]["threshold"]
    words = ["select", finished_run / "data/web", "--annotations", finished_run / "round-1", "--out", tmp_path / "same"]
    assert capfilt(*words, "--set", f"threshold={threshold!r}").code == 0
    for made in (finished_run / "round-1/dataset").iterdir():
        assert (tmp_path / "same/dataset" / made.name).read_bytes() == made.read_bytes()


def test_a_filter_that_gives_no_itm(annotated: Path, capfilt: Any) -> None:
    """Policies by itc do as ever; one by itm is refused before a run folder is there."""
    for path in (annotated / "a/annotations").iterdir():
        tables.write(path, [replace(one, itm=None) for one in tables.rows(tables.read(path))])
    words = ["select", annotated / "web", "--annotations", annotated / "a", "--out", annotated / "clean"]
    for sets in ([], ["--set", "threshold=keep-rate"], ["--set", "score=itc", "--set", "rank=itm", "--set", "top_k=1"]):
        done = capfilt(*words, *sets)
        assert done.code == 2
        assert "itm is needed, and the filter of" in done.line
        assert "gives itc alone: set score=itc" in done.line
    assert not (annotated / "clean").exists()
    done = capfilt(*words, "--set", "score=itc", "--set", "threshold=0.4")
    assert done.code == 0, done.err
    assert kept(annotated / "clean") == {
        "a": ["synthetic a"], "b": ["synthetic b", "web b"], "c": ["synthetic c", "web c"],
    }  # fmt: skip
    assert capfilt("report", annotated / "clean").code == 0


def test_human_pairs_are_not_touched(finished_run: Path, snapshot: Any, capfilt: Any, tmp_path: Path) -> None:
    before = snapshot(finished_run / "data")
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    assert capfilt("bootstrap", finished_run.parent / "mine.yaml", "--out", run, "--rounds", 1).code == 0
    assert snapshot(finished_run / "data") == before
    seen = {entry["shard"] for entry in map(json.loads, (p.read_text() for p in run.glob("round-1/ledger/select/*")))}
    assert seen == {"00000", "00001", "00002"}, "the web's shards and no others"


def test_other_annotations_of_the_same_size_are_noticed(annotated: Path, capfilt: Any, snapshot: Any) -> None:
    words = ["select", annotated / "web", "--annotations", annotated / "a", "--out", annotated / "clean"]
    assert capfilt(*words).code == 0
    before = snapshot(annotated / "clean")
    assert capfilt(*words).code == 0
    assert snapshot(annotated / "clean") == before
    path = annotated / "a/annotations/00000.parquet"
    size = path.stat().st_size
    a, b = SCORES["b"], SCORES["a"]  # the two of the shard change places
    swapped = [("a", "web", *a), ("a", "synthetic", *a[::-1]), ("b", "web", *b), ("b", "synthetic", *b[::-1])]
    tables.write(path, (row(*fields) for fields in swapped))
    assert path.stat().st_size == size
    assert capfilt(*words).code == 0
    after = snapshot(annotated / "clean")
    assert {name for name in after if after[name] != before[name]} == {
        "ledger/select/00000.json", "dataset/00000.parquet", "dataset/00000.tar",
    }  # fmt: skip


def test_a_key_that_comes_three_times_is_one_sample_and_two_failures(tmp_path: Path, capfilt: Any) -> None:
    import io
    import tarfile

    (tmp_path / "web").mkdir()
    with tarfile.open(tmp_path / "web/00000.tar", "w") as tar:
        for _ in range(3):
            for extension, data in (("jpg", b"the bytes of a"), ("txt", b"web a")):
                header = tarfile.TarInfo(f"a.{extension}")
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    twice = row("a", "web", None, None, status="failed", reason="duplicate key")
    tables.write(tmp_path / "a/annotations/00000.parquet", [row("a", "web", 0.9, 0.9), twice, twice])
    done = capfilt("select", tmp_path / "web", "--annotations", tmp_path / "a", "--out", tmp_path / "clean", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["samples"] == {"in": 3, "kept": 1, "dropped": 0, "failed": 2}


class TestCalibrated:
    def test_the_verb_finds_the_threshold_of_the_round(self, colours: Path, tmp_path: Path, capfilt: Any) -> None:
        home, judge = colours.parent, colours / "round-1/filter/checkpoint"
        done = capfilt(
            "select", home / "web", "--annotations", colours / "round-1", "--out", tmp_path / "clean",
            "--set", "threshold=calibrated", "--set", "recall=0.7", "--val", home / "val", "--filter", judge, "--json",
        )  # fmt: skip
        assert done.code == 0, done.err
        made = json.loads((colours / "round-1/calibration.json").read_text())
        assert json.loads((tmp_path / "clean/calibration.json").read_text()) == made
        assert json.loads(done.out)["threshold"] == made["threshold"]
        cleaned = (colours / "round-1/dataset/00000.tar").read_bytes()
        assert (tmp_path / "clean/dataset/00000.tar").read_bytes() == cleaned

    @pytest.mark.parametrize("given", [[], ["--val"], ["--filter"]])
    def test_it_needs_both(self, annotated: Path, finished_run: Path, capfilt: Any, given: list[str]) -> None:
        values = {"--val": finished_run / "data/val", "--filter": finished_run / "round-1/filter"}
        words = [word for name in given for word in (name, values[name])]
        done = capfilt(
            "select", annotated / "web", "--annotations", annotated / "a", "--out", annotated / "clean",
            "--set", "threshold=calibrated", *words,
        )  # fmt: skip
        assert done.code == 2
        assert "needs --val SHARDS and --filter MODEL" in done.line
        assert not (annotated / "clean").exists()

    def test_another_filter_s_threshold_means_nothing(self, finished_run: Path, tmp_path: Path, capfilt: Any) -> None:
        other = finished_run / "round-1/pretrain"
        done = capfilt(
            "select", finished_run / "data/web", "--annotations", finished_run / "round-1", "--out", tmp_path / "clean",
            "--set", "threshold=calibrated", "--val", finished_run / "data/val", "--filter", other,
        )  # fmt: skip
        assert done.code == 2
        assert "was scored by another filter" in done.line

    def test_a_captioner_cannot_be_the_filter(self, finished_run: Path, tmp_path: Path, capfilt: Any) -> None:
        captioner = finished_run / "round-1/captioner"
        assert "encoder" not in store.architecture(store.find(str(captioner))).text.roles
        done = capfilt(
            "select", finished_run / "data/web", "--annotations", finished_run / "round-1", "--out", tmp_path / "clean",
            "--set", "threshold=calibrated", "--val", finished_run / "data/val", "--filter", captioner,
        )  # fmt: skip
        assert done.code == 2
        assert "cannot be the filter" in done.line


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--set", "threshold=0.95"], 1, "kept none of 8 texts at itm >= 0.9500"),
        (["--set", "threshold=some"], 2, "'threshold' is 'some'"),
        (["--set", "treshold=0.5"], 2, "Did you mean 'threshold'?"),
        (["--annotations", "{root}/web"], 2, "web holds no annotations/"),
    ],
)
def test_what_cannot_be_done_is_said(annotated: Path, capfilt: Any, words: list[str], code: int, said: str) -> None:
    given = [word.format(root=annotated) for word in words]
    done = capfilt("select", annotated / "web", "--annotations", annotated / "a", "--out", annotated / "clean", *given)
    assert done.code == code
    assert said in done.line


@pytest.mark.parametrize(
    ("words", "same_as"),
    [
        (["--threshold", "0.4", "--score", "itc"], ["threshold=0.4", "score=itc"]),
        (["--keep-rate", "0.25"], ["threshold=keep-rate", "keep_rate=0.25"]),
        (["--keep-rate", "0.25", "--set", "threshold=keep-rate"], ["threshold=keep-rate", "keep_rate=0.25"]),
        (["--threshold", "keep-rate"], ["threshold=keep-rate"]),
        (["--top-k", "1"], ["top_k=1"]),
        (["--top-k", "1", "--threshold", "none", "--score", "itc"], ["top_k=1", "score=itc"]),
        (["--top-k", "2", "--threshold", "0.3", "--set", "threshold=0.3"], ["top_k=2", "threshold=0.3"]),
        (["--threshold", "none"], ["threshold=null"]),
        (["--keep", "web-first"], ["keep=web-first"]),
        (["--keep", "best", "--set", "rank=itm"], ["keep=best", "rank=itm"]),
        (["--recipe", "blip2-two", "--top-k", "1"], ["top_k=1"]),
        (["--recipe", "{root}/half.yaml", "--keep-rate", "0.25"], ["threshold=keep-rate", "keep_rate=0.25"]),
    ],
)
def test_options_are_settings(annotated: Path, capfilt: Any, words: list[str], same_as: list[str]) -> None:
    (annotated / "half.yaml").write_text("threshold: 0.5\n")
    sets = [word for assignment in same_as for word in ("--set", assignment)]
    plans = {}
    for out, given in (("a-run", words), ("b-run", sets)):
        given = [word.format(root=annotated) for word in given]
        common = ["--annotations", annotated / "a", "--out", annotated / out]
        done = capfilt("select", annotated / "web", *common, *given)
        assert done.code == 0, done.err
        plans[out] = json.loads((annotated / out / "plan.json").read_text())
    assert plans["a-run"] == plans["b-run"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--threshold", "half"], "--threshold half: give a number, calibrated, keep-rate or none."),
        (["--threshold", "keeprate"], "Did you mean 'keep-rate'?"),
        (["--threshold", "1.1"], "'threshold' is 1.1: it is compared with itm, which lies in [0, 1]"),
        (["--score", "itc", "--threshold", "-1.1"], "it is compared with itc, which lies in [-1, 1]"),
        (["--keep", "bst"], "Did you mean 'best'?"),
        (["--keep-rate", "1"], "--keep-rate: 'keep_rate' is 1.0"),
        (
            ["--keep-rate", "0.3", "--threshold", "0.4"],
            "--keep-rate 0.3 sets the threshold itself, which is given as 0.4",
        ),
        (["--keep-rate", "0.3", "--set", "threshold=null"], "which is given as none"),
        (["--threshold", "0.3", "--set", "threshold=0.4"], "--threshold 0.3 and --set threshold=0.4 differ"),
        (["--threshold", "none", "--set", "threshold=0.4"], "--threshold none and --set threshold=0.4 differ"),
        (["--top-k", "1", "--set", "top_k=2"], "--top-k 1 and --set top_k=2 differ; give one of them."),
        (["--top-k", "1", "--keep", "best"], "top_k 1 and keep best both say how many texts of an image are kept"),
        (["--top-k", "1", "--score", "itm"], "--set rank=itm ranks them by itm"),
        (["--set", "keep_rate=0.3"], "'keep_rate' is 0.3: it has no effect without threshold=keep-rate"),
        (["--calibrate", "labels", "--keep-rate", "0.3"], "--calibrate labels sets the threshold itself"),
        (["--calibrate", "labels", "--set", "threshold=0.3"], "--calibrate labels sets the threshold itself"),
    ],
)
def test_a_refused_policy_leaves_the_folder_free(annotated: Path, capfilt: Any, words: list[str], said: str) -> None:
    common = [annotated / "web", "--annotations", annotated / "a", "--out", annotated / "clean"]
    done = capfilt("select", *common, *words)
    assert done.code == 2
    assert said in done.line
    assert not (annotated / "clean").exists()
    assert capfilt("select", *common).code == 0


def test_a_run_that_was_made_with_best_of_goes_on(
    annotated: Path, capfilt: Any, snapshot: Any, caplog: pytest.LogCaptureFixture
) -> None:
    out = annotated / "clean"
    words = ["select", annotated / "web", "--annotations", annotated / "a", "--out", out, "--threshold", "0.1"]
    assert capfilt(*words, "--keep", "web-first").code == 0
    # What the version before wrote: the plan, the recipe, and a fingerprint of these fields.
    plan = json.loads((out / "plan.json").read_text())
    assert plan["keep"] == "best-of"
    (out / "recipe.yaml").write_text((out / "recipe.yaml").read_text().replace("web-first", "best-of"))
    ranking = {"combine": "and", "other_threshold": None, "top_k": 0, "rank": "itc", "keep": "best-of"}
    scores = hashlib.sha256((annotated / "a/annotations/00000.parquet").read_bytes()).hexdigest()
    expected = fingerprint({**ranking, "score": "itm", "threshold": 0.1, "carry": True}, "00000", scores)
    assert json.loads((out / "ledger/select/00000.json").read_text())["fingerprint"] == expected
    (out / "ledger/select/00001.json").unlink()
    before = snapshot(out)
    done = capfilt(*words, "--set", "keep=best-of")
    assert done.code == 0
    (note,) = caplog.records
    assert note.getMessage().startswith("note: keep=best-of is called web-first now")
    changed = {name for name, file in snapshot(out).items() if file != before.get(name)}
    assert not {name for name in changed if "00000" in name}, "the first shard was done"
    before = snapshot(out)
    assert capfilt(*words, "--keep", "web-first").code == 0
    assert len(caplog.records) == 1
    assert snapshot(out) == before
    whys = pq.read_table(out / "dataset/00000.parquet").column("why").to_pylist()
    assert whys == ["a web text of the image passes", "", "a web text of the image passes", ""]
    assert capfilt("report", out).code == 0


class TestBySize:
    """Without --address small work runs in this process."""

    def test_a_small_selection_starts_no_ray(self, annotated: Path, capfilt: Any) -> None:
        words = ["select", annotated / "web", "--annotations", annotated / "a", "--out", annotated / "clean"]
        done = capfilt(*words, address=None)
        assert done.code == 0, done.err
        assert "select: 9 texts in 2 shards: few enough for this process; --address start" in done.err
        assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()
        assert "few enough" not in capfilt(*words).err

    def test_the_ledger_says_how_much_there_is(self, finished_run: Path, annotated: Path) -> None:
        named = shards.by_name(shards.expand(str(finished_run / "data/web")))
        sizes = [Path(url).stat().st_size for url in named.values()]
        counted = workload.of_selection(finished_run / "round-1/annotations", named)
        assert counted == workload.Workload(shards=3, texts=120, bytes=sum(sizes))
        assert workload.of_shards([*named.values()]) == workload.Workload(shards=3, bytes=sum(sizes))
        named = shards.by_name(shards.expand(str(annotated / "web")))  # its annotations have no ledger
        assert workload.of_selection(annotated / "a/annotations", named) == workload.Workload(shards=2, texts=9)

    @pytest.mark.parametrize(
        ("work", "options", "address"),
        [
            (workload.Workload(200, 50_000, 2 * 10**9), {}, "local"),
            (workload.Workload(201), {}, "start"),
            (workload.Workload(1, 50_001), {}, "start"),
            (workload.Workload(1, 1, 2 * 10**9 + 1), {}, "start"),
            (workload.Workload(1, 1), {"workers": 2}, "start"),
            (workload.Workload(1, 1), {"workers": 1}, "start"),
            (workload.Workload(1, 1), {"cpus": 0.5}, "start"),
            (workload.Workload(1, 1), {"min_success": 0.5}, "local"),
        ],
    )
    def test_more_work_or_workers_get_a_ray(
        self, work: workload.Workload, options: dict[str, Any], address: str
    ) -> None:
        lines: list[str] = []
        show = progress_of(None, lines.append)
        given = CommandOptions(**options)
        assert workload.working_address(workload.BY_SIZE, work, given, "select", show) == address
        assert len(lines) == (address == "local")
        for typed in ("local", "start", "auto", "ray://head:10001"):
            assert workload.working_address(typed, work, given, "select", show) == typed


def test_shards_and_annotations_must_belong_together(annotated: Path, capfilt: Any) -> None:
    words = ["--annotations", annotated / "a", "--out", annotated / "clean"]
    shards.write(annotated / "web/00002.tar", [sample("f")])
    done = capfilt("select", annotated / "web", *words)
    assert done.code == 1
    assert "shard 00002 has no annotations" in done.line
    (annotated / "web/00002.tar").unlink()
    shards.write(annotated / "web/00001.tar", [sample(key) for key in "cdex"])
    done = capfilt("select", annotated / "web", *words)
    assert done.code == 1
    assert "key x has no annotation" in done.line
    assert "1 of 2 failed" in done.line
    assert (annotated / "clean/ledger/select/00000.json").exists(), "the other shard is done and stays done"
    assert not (annotated / "clean/dataset/00001.tar").exists()


def tar_of(path: Path, files: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in files:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))


def test_what_lies_under_a_key_comes_along_and_names_with_dots_too(tmp_path: Path, capfilt: Any) -> None:
    """As it lay there, byte for byte; `carry=false` leaves it, and `verify` counts every member either way."""
    keys = {"k": "k", "22.05 track 1": "22%2E05 track 1"}
    beside = {"npy": b"\x93NUMPY", "cls": b"3", "mask.png": b"mask", "syn.json": b"{}"}
    files = [file for key in keys for file in ((f"{key}.jpg", key.encode()), (f"{key}.txt", b"t"))]
    files = files[:2] + [(f"k.{name}", data) for name, data in beside.items()] + files[2:]
    tar_of(tmp_path / "web/00000.tar", [*files, ("._k.jpg", b"Mac OS X"), ("README", b"")])
    images = {key: Sample(key, key.encode(), "jpg", "t") for key in keys}
    rows = [replace(row(key, "web", 0.9, 0.9), uid=own.uid, sha256=own.sha256) for key, own in images.items()]
    tables.write(tmp_path / "a/annotations/00000.parquet", rows)
    for carry, more, counted in (("true", beside, {"carried": 4}), ("false", {}, {"not carried": 4})):
        out = tmp_path / carry
        words = ["--annotations", tmp_path / "a", "--out", out, "--set", f"carry={carry}", "--json"]
        done = capfilt("select", tmp_path / "web", *words)
        assert done.code == 0, done.err
        members = {"in": 10, "used": 4, **counted, "AppleDouble": 1, "a name without key or extension": 1}
        assert json.loads(done.out)["members"] == members
        with tarfile.open(out / "dataset/00000.tar") as tar:
            result = {one.name: tar.extractfile(one).read() for one in tar}  # type: ignore[union-attr]
        texts = {f"{key}.{kind}" for key in keys.values() for kind in ("txt", "json")}
        assert result.keys() - texts == {"k.jpg", "22%2E05 track 1.jpg", *(f"k.{name}" for name in more)}
        assert {name: result[f"k.{name}"] for name in more} == more
        assert json.loads(result["22%2E05 track 1.json"])["original_key"] == "22.05 track 1"
        passed = "1 AppleDouble, 1 a name without key or extension" + (", 4 not carried" if carry == "false" else "")
        said = f"select: 10 members of its shards = 4 used + {4 if more else 0} carried + {2 if more else 6} skipped"
        checked = capfilt("verify", out)
        assert checked.code == 0, checked.out
        assert f"{said} ({passed})" in checked.out.replace("\n", " ")
        assert json.loads(capfilt("verify", out, "--json").out)["members"] == {"select": members}


def test_members_that_do_not_add_up_are_found(annotated: Path, capfilt: Any) -> None:
    out = annotated / "clean"
    capfilt("select", annotated / "web", "--annotations", annotated / "a", "--out", out)
    path = out / "ledger/select/00000.json"
    said = json.loads(path.read_text())
    assert said["tally"]["members"] == {"in": 6, "used": 6}
    said["tally"]["members"]["used"] = 5
    path.write_text(json.dumps(said))
    done = capfilt("verify", out)
    assert done.code == 1
    assert "members: 6 in, but 5 used, carried or skipped" in done.out
