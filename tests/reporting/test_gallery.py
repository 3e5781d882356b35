from __future__ import annotations

import base64
import io
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import capfilt.data.annotations as tables
from capfilt.data import parquet, shards
from capfilt.data.annotations import Annotation
from capfilt.data.labels import Label
from capfilt.data.policy import PolicyConfig, verdicts_of_table
from capfilt.data.sample import SOURCES, Sample
from capfilt.reporting import sampling, thumbnails
from capfilt.reporting.gallery import ColumnLists, annotated_round
from capfilt.reporting.sampling import RoundSample, RoundSource
from capfilt.runs.tally import NO_TEXT, Tally
from capfilt.stages.select import verdicts

RULE = PolicyConfig().rule(0.5)


def row(key: str, source: str = "web", itm: float | None = 0.5, text: str = "a red dog", **more: Any) -> Annotation:
    uid = f"{int(key):032x}"
    return Annotation(key, uid, "s", source, 0, text, itm, 0.1, "", "f", 0, 1, **more)


@pytest.fixture
def source(tmp_path: Path) -> RoundSource:
    """A hundred images in ten shards, itm from 0.005 to 0.995, the last of each shard unreadable."""
    for shard in range(10):
        rows = []
        for i in range(shard * 10, shard * 10 + 10):
            rows += [row(f"{i}", itm=i / 100 + 0.005), row(f"{i}", "synthetic", itm=0.9)]
        broken = replace(rows[-1], itm=None, itc=None, status="failed", reason="truncated image: at byte 7")
        tables.write(tmp_path / f"annotations/{shard:05d}.parquet", [*rows[:-2], replace(broken, uid="")])
    return RoundSource(1, tmp_path / "annotations", None, RULE, "itm", 0.5, "capfilt select web", "out")


def sampled(
    source: RoundSource, max_texts: int = 1000, truths: dict[str, tuple[bool, str]] | None = None
) -> RoundSample:
    sample = RoundSample(source, max_texts)
    for shard in range(10):
        sample.add(f"{shard:05d}", truths or {}, sample=True)
    return sample


def test_counts_are_of_all_texts_the_page_holds_a_sample(source: RoundSource) -> None:
    whole, few = sampled(source), sampled(source, max_texts=40)
    assert whole.counts.totals == few.counts.totals == {"web": 90, "synthetic": 90, "human": 0}
    assert whole.counts.histograms() == few.counts.histograms()
    assert sum(whole.counts.histograms()["itm"]["web"].layers["unknown"]) == 90
    assert (len(whole.images), whole.num_rows) == (100, 190)
    assert 38 <= few.num_rows <= 40
    # The same images whatever the limit, in the same order: the rounds of a run show the same pictures.
    positions = [image.id for image in whole.images]
    assert [image.id for image in few.images] == positions[: len(few.images)]
    assert {position[0] for position in positions[:40]} > {"00001", "00005"}, "from all shards"


def test_what_is_no_text_is_neither_counted_nor_shown(tmp_path: Path) -> None:
    bare = row("0", itm=None, text="...", reason=NO_TEXT)
    rows = [bare, row("0", "synthetic"), row("1", "human", itm=0.7), row("1", "synthetic")]
    tables.write(tmp_path / "annotations/00000.parquet", rows)
    sample = RoundSample(RoundSource(1, tmp_path / "annotations", None, RULE, "itm", 0.5, "", ""), 10)
    sample.add("00000", {}, sample=True)
    assert sample.counts.totals == {"web": 0, "synthetic": 2, "human": 1}
    assert sample.counts.histograms().keys() == {"itm", "itc"}
    assert sample.num_rows == 3
    shown = annotated_round(sample, {image.id: i for i, image in enumerate(sample.images)}, {}, {}, ColumnLists())
    assert sorted(SOURCES[code] for code in shown.texts["source"]) == ["human", "synthetic", "synthetic"]


def test_a_histogram_has_equal_bins_where_the_texts_are(source: RoundSource) -> None:
    bars = sampled(source).counts.histograms()["itm"]["web"]
    assert (bars.low, bars.high) == (0.0, 1.0)
    per_bin = bars.layers["unknown"]
    assert len(per_bin) == 50
    # i / 100 falls in two hundredths each, but where the unreadable last of a shard is missing.
    assert per_bin == [2, 2, 2, 2, 1] * 10


def test_truth_is_given_for_the_first_web_text_alone(source: RoundSource) -> None:
    known = {f"{i:032x}": (i % 2 == 0, "seo") for i in range(100)}
    sample = sampled(source, truths=known)
    itm = sample.counts.histograms()["itm"]
    assert {name: sum(bars) for name, bars in itm["web"].layers.items()} == {"wrong": 40, "right": 50}
    assert set(itm["synthetic"].layers) == {"unknown"}
    lists = ColumnLists()
    positions = {image.id: number for number, image in enumerate(sample.images)}
    shown = annotated_round(sample, positions, known, {}, lists)
    truths = [truth for truth, source in zip(shown.texts["truth"], shown.texts["source"], strict=True) if source == 1]
    assert set(truths) == {-1}
    assert list(lists.kinds) == ["seo"]
    assert list(lists.reasons) == [("truncated image: at byte 7", "truncated image", True)]


def test_scores_come_back_as_the_numbers_that_were_compared(tmp_path: Path) -> None:
    scores = np.random.default_rng(0).random(200).astype(np.float32)
    tables.write(tmp_path / "annotations/00000.parquet", [row(f"{i}", itm=float(s)) for i, s in enumerate(scores)])
    sample = RoundSample(RoundSource(1, tmp_path / "annotations", None, RULE, "itm", 0.5, "", ""), 1000)
    sample.add("00000", {}, sample=True)
    positions = {image.id: number for number, image in enumerate(sample.images)}
    shown = annotated_round(sample, positions, {}, {}, ColumnLists())
    assert {np.float32(value) for value in shown.texts["itm"]} == set(scores)


def test_long_texts_are_cut_and_labels_found(tmp_path: Path) -> None:
    long = "y" * 10_000
    tables.write(tmp_path / "annotations/00000.parquet", [row("1", text=long), row("2"), row("3", text=" ", itm=None)])
    sample = RoundSample(RoundSource(1, tmp_path / "annotations", None, RULE, "itm", 0.5, "", ""), 1000)
    sample.add("00000", {}, sample=True)
    labels = {(f"{1:032x}", long): Label(f"{1:032x}", long, "web", "wrong", at_random=False)}
    lists = ColumnLists()
    shown = annotated_round(sample, {image.id: i for i, image in enumerate(sample.images)}, {}, labels, lists)
    position = shown.texts["text"].index("y" * sampling.MAX_TEXT)
    assert shown.full_lengths == {position: 10_000}
    assert shown.texts["label"][position] == 2
    assert sorted(shown.texts["label"]) == [-1, -1, 2]
    assert list(lists.reasons) == [("no text", "no text", False)]
    assert shown.lengths["web"][:4] == [1, 1, 0, 1]


def test_of_a_large_run_some_shards_are_counted_and_fewer_shown(
    source: RoundSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn by their names, as many as have enough texts; the pictures of small shards are of more of them."""
    everything = tables.shards_in(source.annotations)
    assert sampling.draw_shards([source]) == sampling.DrawnShards(everything, set(everything), 10)
    rows = parquet.num_rows(source.annotations / "00000.parquet")
    for name, value in {"MAX_COUNTED": 6 * rows + 1, "MAX_TEXTS": rows, "MAX_SHARDS": 1}.items():
        monkeypatch.setattr(sampling, name, value)
    drawn = sampling.draw_shards([source])
    assert (len(drawn.counted), len(drawn.sampled), drawn.total) == (6, 2, 10)
    assert drawn.sampled < set(drawn.counted) < set(everything)
    assert drawn.counted == sorted(drawn.counted) != everything[:6]
    monkeypatch.setattr(sampling, "MAX_COUNTED_SHARDS", 3)
    assert len(sampling.draw_shards([source]).counted) == 3


@pytest.mark.parametrize("score", ["itm", "itc"])
def test_a_threshold_decides_on_a_whole_table_as_on_each_row(score: str, tmp_path: Path) -> None:
    texts = ("a dog", "...", "", "犬", "½", "🐕", "$ | --", "7")
    rows = [row(f"{i}", itm=i / 8, text=text) for i, text in enumerate(texts)]
    rows += [replace(row("8"), itm=None, itc=None), row("9", text="", reason="caption failed: timeout")]
    rows += [
        replace(row("10"), itm=None, itc=None, status="failed", reason="truncated image"),
        replace(row("11"), itm=float(np.float32(0.1))),
    ]
    rule = PolicyConfig(score=score).rule(0.1)
    tables.write(tmp_path / "00000.parquet", rows)
    table = tables.read(tmp_path / "00000.parquet")
    expected = verdicts(list(tables.rows(table)), rule)
    assert verdicts_of_table(table, rule) == expected
    assert len(set(expected)) >= 5
    assert verdicts_of_table(table, PolicyConfig(top_k=1).rule(0.1)) is None


def test_outcomes_of_a_large_run_are_those_of_its_ledger(source: RoundSource) -> None:
    """All shards have a verdict there; what is counted here is of some."""
    recorded = Tally(
        samples=Counter({"in": 1000, "kept": 600, "dropped": 300, "failed": 100}),
        texts={
            "in": Counter(web=900, synthetic=900),
            "kept": Counter(web=400, synthetic=500),
            "dropped": Counter({"web: itm below threshold": 490, f"web: {NO_TEXT}": 10, "synthetic: x": 400}),
        },
        failed=Counter({"truncated image": 100}),
    )
    whole = sampled(source)
    shown = annotated_round(
        whole, {image.id: i for i, image in enumerate(whole.images)}, {}, {}, ColumnLists(), recorded
    )
    assert shown.totals == {"web": 890, "synthetic": 900}
    counts = shown.counts
    assert counts is not None
    assert (counts.images, counts.kept_images, counts.failed) == (900, 600, {"truncated image": 100})
    assert (counts.kept, counts.texts) == ({"web": 400, "synthetic": 500}, {"web": 890, "synthetic": 900})
    assert shown.histograms == whole.counts.histograms()


def test_the_closest_calls_have_thumbnails(source: RoundSource) -> None:
    sample = sampled(source)
    chosen = thumbnails.images_to_show([sample], limit=20)
    assert len(chosen) == 20
    closest = {(f"{i // 10:05d}", str(i)) for i in (46, 47, 48, 50, 51, 52, 53, 54)}
    assert closest <= chosen
    assert len(thumbnails.images_to_show([sample])) == 100


def test_long_texts_leave_less_room_for_pictures(
    source: RoundSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = sampled(source)
    assert thumbnails.byte_budget([short]) == thumbnails.MAX_THUMBNAIL_BYTES
    monkeypatch.setattr(thumbnails, "MAX_PAGE_BYTES", 100_000)
    assert 0 < thumbnails.byte_budget([short]) < 75_000
    many = [row(f"{i}", text="<" * 5000) for i in range(50)]  # six bytes each where they may not end an element
    tables.write(tmp_path / "long/00000.parquet", many)
    sample = RoundSample(replace(source, annotations=tmp_path / "long"), 1000)
    sample.add("00000", {}, sample=True)
    assert thumbnails.byte_budget([sample]) == 0


def test_thumbnails_are_small_and_a_broken_picture_has_none(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((640, 320), 60).convert("RGB").save(buffer, "JPEG")
    made = [Sample("1", buffer.getvalue(), "jpg", "x"), Sample("2", b"no picture", "jpg", "x")]
    shards.write(tmp_path / "00000.tar", made)
    urls = {"00000": str(tmp_path / "00000.tar")}
    small = thumbnails.thumbnails(urls, {("00000", "1"), ("00000", "2"), ("00001", "1")})
    assert set(small) == {("00000", "1")}
    head, _, data = small["00000", "1"].partition(",")
    assert head == "data:image/webp;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (480, 240), "few pictures may be large"
    noisy = buffer.getvalue()
    few_bytes = thumbnails.thumbnail(noisy, 480, max_bytes=1000)
    assert few_bytes is not None
    assert Image.open(io.BytesIO(few_bytes)).size == (128, 64)
    assert thumbnails.thumbnails(urls, {("00000", "1")}, max_bytes=0) == {}
