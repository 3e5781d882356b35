"""Run folders and shards of strangers that want the report to become a hundred megabytes, or its maker to."""

from __future__ import annotations

import io
import json
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import capfilt.data.annotations as tables
from capfilt.data import shards
from capfilt.data.annotations import Annotation
from capfilt.data.policy import PolicyConfig
from capfilt.data.sample import Sample
from capfilt.errors import UsageError
from capfilt.evaluation.known_truth import MAX_KIND, MAX_KINDS, ScoredTexts, truth
from capfilt.pipelines.inspect import report
from capfilt.printable import MAX_NAME
from capfilt.reporting import collect, page, review, sampling
from capfilt.reporting.charts import Histogram
from capfilt.reporting.gallery import ColumnLists
from capfilt.reporting.page_data import COLUMNS, MAX_LINES, MAX_ROUNDS, AnnotatedRound, PageData, Training
from capfilt.reporting.sampling import RoundSample, RoundSource, SampledImage

Make = Callable[..., Path]


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


def row(number: int, text: str = "a dog", **more: Any) -> Annotation:
    known: dict[str, Any] = {"key": f"{number:05d}", "uid": f"{number:032x}", "sha256": "", "source": "web"}
    scores: dict[str, Any] = {"candidate": 0, "itm": number % 100 / 100, "itc": 0.1, "captioner": "", "filter": ""}
    return Annotation(text=text, **{**known, **scores, "seed": 0, "round": 0, **more})


@pytest.fixture
def annotated(tmp_path: Path) -> Make:
    """A run folder of `annotate` with these rows, and its shard with this truth for each sample."""

    def make(rows: list[Annotation], truths: list[Any] | None = None) -> Path:
        image = picture()
        answer = truths or [{"matches": True, "kind": "right"}] * len(rows)
        meta = [{"uid": f"{n:032x}", "truth": each} for n, each in enumerate(answer)]
        samples = [Sample(f"{n:05d}", image, "png", "a dog", each) for n, each in enumerate(meta)]
        shards.write(tmp_path / "00000.tar", samples)
        folder = tmp_path / "run"
        tables.write(folder / "annotations" / "00000.parquet", rows)
        plan = {"verb": "annotate", "shards": [str(tmp_path / "00000.tar")]}
        (folder / "plan.json").write_text(json.dumps(plan))
        (folder / "recipe.yaml").write_text("{}")
        return folder

    return make


def reported(folder: Path, max_bytes: int, max_memory: int) -> dict[str, Any]:
    """What the page's script reads; the page is that small and was made in that little memory."""
    tracemalloc.start()
    try:
        report.run(folder)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    html = (folder / collect.PAGE).read_text("utf-8")
    assert len(html.encode()) < max_bytes
    assert peak < max_memory
    (island,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html)
    result: dict[str, Any] = json.loads(island)
    return result


def test_kinds_of_truth_are_short(annotated: Make) -> None:
    """92 MB of shards whose kinds are all "<" made a page of 576 MB, in 2.7 GB."""
    truths = [{"matches": False, "kind": f"{n}{'k' * 400_000}\x1b[2J"} for n in range(60)]
    data = reported(annotated([row(n) for n in range(60)], truths), 150_000, 12_000_000)
    assert len(data["kinds"]) == 60
    assert {len(kind) for kind in data["kinds"]} == {MAX_KIND}
    assert all(kind.isprintable() for kind in data["kinds"])
    assert set(data["looks"][0]["texts"]["truth"]) == {0}


def test_kinds_of_truth_are_few(annotated: Make) -> None:
    count = MAX_KINDS + 30
    truths = [{"matches": False, "kind": f"kind {n}"} for n in range(count)]
    data = reported(annotated([row(n) for n in range(count)], truths), 200_000, 20_000_000)
    assert len(data["kinds"]) == MAX_KINDS + 1
    assert data["kinds"][-1] == "other"


def test_a_kind_that_is_a_tree_is_not_written_out() -> None:
    tree: Any = {"a": list(range(10**6))}
    sample = Sample("k", b"", "png", "", {"truth": {"matches": False, "kind": tree}})
    assert truth(sample) == (False, "{'a': [0, 1, 2, 3, 4, 5, ...]}")


def test_figures_by_kind_are_few() -> None:
    judged = ScoredTexts()
    judged.add(1.0, (True, "right"))
    for n in range(5000):
        judged.add(n / 5000, (False, f"kind {n}"))
    by_kind = judged.figures(0.5)["auc_by_kind"]
    assert len(by_kind) == MAX_KINDS
    assert "other" in by_kind


def test_keys_texts_and_reasons_are_short(annotated: Make) -> None:
    long = {"itm": None, "itc": None, "status": "failed", "uid": ""}
    rows = [row(n, "t" * 10**6) for n in range(10)]
    rows += [row(n, "", key=str(n) + "\x1b" * 10**6, reason=f"{n} {'r' * 10**6}", **long) for n in range(10, 20)]
    folder = annotated(rows)
    data = reported(folder, 150_000, 150_000_000)
    assert all(key.isprintable() and len(key) <= MAX_NAME for key, _ in data["images"])
    assert all(len(text) <= MAX_NAME for reason in data["reasons"] for text in reason[:2])
    texts = data["looks"][0]["texts"]
    assert {len(text) for text in texts["text"]} == {0, sampling.MAX_TEXT}
    assert set(data["looks"][0]["cut"].values()) == {10**6}
    session = review.ReviewSession(folder, collect.collect_report(folder))
    assert sum(len(text) for texts in session.report.texts for _, _, text in texts) == 10 * sampling.MAX_TEXT_IN_MEMORY
    with pytest.raises(UsageError, match="too long"):
        session.add_label(
            {"look": 0, "row": texts["text"].index("t" * sampling.MAX_TEXT), "verdict": "right", "at_random": True}
        )


def test_reasons_in_the_page_are_few() -> None:
    lists = ColumnLists()
    for n in range(5000):
        lists.reason(row(0, status="failed"), f"reason {n}")
    assert len(lists.reasons) == 257
    assert lists.reasons["other", "other", True] == 256


def test_texts_that_are_long_on_the_page_are_fewer(tmp_path: Path) -> None:
    rows = [row(n, "<" * 400) for n in range(100)]  # six bytes each where they may not end an element
    tables.write(tmp_path / "annotations" / "00000.parquet", rows)
    result = RoundSample(
        RoundSource(0, tmp_path / "annotations", None, PolicyConfig().rule(0.5), "itm", 0.5, "", ""), 100, 100_000
    )
    result.add("00000", {}, sample=True)
    assert 90_000 < result.num_bytes <= 100_000
    assert len(result.images) == 100_000 // (sampling.IMAGE_BYTES + sampling.ROW_BYTES + 2402 + 7)
    assert result.counts.totals["web"] == 100
    ranks = sorted(sampling.random_rank(SampledImage(("00000", r.key), r.uid)) for r in rows)
    assert [sampling.random_rank(image) for image in result.images] == ranks[: len(result.images)]


@pytest.mark.parametrize(
    ("name", "named"),
    [("{:09d}", "s3://bucket/{000000000..000099999}.tar"), ("{:x}-of", "the 100000 shards of the run")],
)
def test_a_command_of_many_shards_is_short(tmp_path: Path, name: str, named: str) -> None:
    (tmp_path / "annotations").mkdir()
    web = [f"s3://bucket/{name.format(n)}.tar" for n in range(100_000)]
    result = collect._source(0, (tmp_path, None), PolicyConfig(), 0.5, tmp_path, web)
    assert result.select_command == f"capfilt select '{named}' --annotations {tmp_path}"


def test_a_shard_s_name_may_be_no_text() -> None:
    name = b"\xff\xfe".decode("utf-8", "surrogateescape")
    assert sampling.in_random_order([name]) == [name]
    assert sampling.random_rank(SampledImage((name, "k"), "")) >= 0


def test_folders_that_are_no_rounds_are_passed_over(annotated: Make) -> None:
    folder = annotated([row(0)])
    for name in ("round-x", f"round-{'9' * 200}", "round-"):
        (folder / name / "pretrain").mkdir(parents=True)
        (folder / name / "pretrain" / "log.jsonl").write_text('{"step": 1, "lm": 2.0}\n')
    assert collect.collect_report(folder).page.trainings == []


def test_a_page_of_everything_large_is_small() -> None:
    long = "\x1b[2J" + "x" * 10**6
    entry = {"round": 1, "samples_in": 5, "dropped": {f"{n}{'y' * 10_000}": 1 for n in range(300)}, "noise_ratio": {}}
    points = [(float(n), 1.0) for n in range(1000)]
    losses = [Training(f"stage-{n}", n, {f"{m}{'z' * 1000}": points for m in range(30)}) for n in range(40)]
    texts = {name: [0] for name in COLUMNS} | {"text": ["a dog"], "itm": [0.5], "itc": [None]}
    bars = Histogram(0.0, 1.0, {"unknown": [1]})
    annotated = AnnotatedRound(
        0, "itm", 0.5, "select", "out", {"web": 1}, {"itm": {"web": bars}}, {"web": [0, 1]}, {}, texts
    )
    data = PageData(
        name=long,
        command=long,
        rounds=[{**entry, "round": n} for n in range(1000)],
        seconds=1.0,
        finished=long,
        trainings=losses,
        annotated_rounds=[annotated],
        images=[(long, None)],
        reasons=[(long, long, True)],
        kinds=[long],
        notes=[long] * 1000,
    )
    html = page.render(data)
    assert len(html.encode()) < 6_000_000
    assert "\x1b" not in html
    assert html.count('<td class="words">other reasons</td><td>236</td>') == MAX_ROUNDS
    assert html.count("<p>\\x1b[2Jxxx") == MAX_LINES
