from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import capfilt.data.annotations as tables
from capfilt.data import shards
from capfilt.data.annotations import Annotation
from capfilt.data.labels import Label
from capfilt.data.policy import PolicyConfig
from capfilt.data.sample import SOURCES, Sample
from capfilt.reporting import gallery
from capfilt.reporting.gallery import Counted, Round, Words
from capfilt.runs.tally import NO_TEXT

RULE = PolicyConfig().rule(0.5)


def row(key: str, source: str = "web", itm: float | None = 0.5, text: str = "a red dog", **more: Any) -> Annotation:
    uid = f"{int(key):032x}"
    return Annotation(key, uid, "s", source, 0, text, itm, 0.1, "", "f", 0, 1, **more)


@pytest.fixture
def round_(tmp_path: Path) -> Round:
    """A hundred images in ten shards, itm from 0.005 to 0.995, the last of each shard unreadable."""
    for shard in range(10):
        rows = []
        for i in range(shard * 10, shard * 10 + 10):
            rows += [row(f"{i}", itm=i / 100 + 0.005), row(f"{i}", "synthetic", itm=0.9)]
        broken = tables.failed(rows[-1], "truncated image: at byte 7")
        tables.write(tmp_path / f"annotations/{shard:05d}.parquet", [*rows[:-2], replace(broken, uid="")])
    return Round(1, tmp_path / "annotations", None, RULE, "itm", 0.5, "capfilt select web", "out")


def counted(round_: Round, max_texts: int = 1000, known: dict[str, tuple[bool, str]] | None = None) -> Counted:
    found = Counted(round_, max_texts)
    for shard in range(10):
        found.add(f"{shard:05d}", known or {}, drawn=True)
    return found


def test_counts_are_of_all_texts_the_page_holds_a_sample(round_: Round) -> None:
    whole, sampled = counted(round_), counted(round_, max_texts=40)
    assert whole.totals == sampled.totals == {"web": 90, "synthetic": 90, "human": 0}
    assert whole.histograms() == sampled.histograms()
    assert sum(whole.histograms()["itm"]["web"].layers["unknown"]) == 90
    assert (len(whole.images), whole.num_rows) == (100, 190)
    assert 38 <= sampled.num_rows <= 40
    # The same images whatever the limit, in the same order: the rounds of a run show the same pictures.
    places = [image.place for image in whole.images]
    assert [image.place for image in sampled.images] == places[: len(sampled.images)]
    assert {place[0] for place in places[:40]} > {"00001", "00005"}, "from all shards"


def test_what_is_no_text_is_neither_counted_nor_shown(tmp_path: Path) -> None:
    bare = row("0", itm=None, text="...", reason=NO_TEXT)
    rows = [bare, row("0", "synthetic"), row("1", "human", itm=0.7), row("1", "synthetic")]
    tables.write(tmp_path / "annotations/00000.parquet", rows)
    found = Counted(Round(1, tmp_path / "annotations", None, RULE, "itm", 0.5, "", ""), 10)
    found.add("00000", {}, drawn=True)
    assert found.totals == {"web": 0, "synthetic": 2, "human": 1}
    assert found.histograms().keys() == {"itm", "itc"}
    assert found.num_rows == 3
    told = gallery.look(found, {image.place: i for i, image in enumerate(found.images)}, {}, {}, Words())
    assert sorted(SOURCES[code] for code in told.texts["source"]) == ["human", "synthetic", "synthetic"]


def test_a_histogram_has_equal_bins_where_the_texts_are(round_: Round) -> None:
    bars = counted(round_).histograms()["itm"]["web"]
    assert (bars.low, bars.high) == (0.0, 1.0)
    per_bin = bars.layers["unknown"]
    assert len(per_bin) == 50
    # i / 100 falls in two hundredths each, but where the unreadable last of a shard is missing.
    assert per_bin == [2, 2, 2, 2, 1] * 10


def test_truth_is_told_of_the_first_web_text_alone(round_: Round) -> None:
    known = {f"{i:032x}": (i % 2 == 0, "seo") for i in range(100)}
    found = counted(round_, known=known)
    itm = found.histograms()["itm"]
    assert {name: sum(bars) for name, bars in itm["web"].layers.items()} == {"wrong": 40, "right": 50}
    assert set(itm["synthetic"].layers) == {"unknown"}
    words = Words()
    places = {image.place: number for number, image in enumerate(found.images)}
    look = gallery.look(found, places, known, {}, words)
    truths = [truth for truth, source in zip(look.texts["truth"], look.texts["source"], strict=True) if source == 1]
    assert set(truths) == {-1}
    assert list(words.kinds) == ["seo"]
    assert list(words.reasons) == [("truncated image: at byte 7", "truncated image", True)]


def test_scores_come_back_as_the_numbers_that_were_compared(tmp_path: Path) -> None:
    scores = np.random.default_rng(0).random(200).astype(np.float32)
    tables.write(tmp_path / "annotations/00000.parquet", [row(f"{i}", itm=float(s)) for i, s in enumerate(scores)])
    found = Counted(Round(1, tmp_path / "annotations", None, RULE, "itm", 0.5, "", ""), 1000)
    found.add("00000", {}, drawn=True)
    places = {image.place: number for number, image in enumerate(found.images)}
    look = gallery.look(found, places, {}, {}, Words())
    assert {np.float32(value) for value in look.texts["itm"]} == set(scores)


def test_long_texts_are_cut_and_labels_found(tmp_path: Path) -> None:
    long = "y" * 10_000
    tables.write(tmp_path / "annotations/00000.parquet", [row("1", text=long), row("2"), row("3", text=" ", itm=None)])
    found = Counted(Round(1, tmp_path / "annotations", None, RULE, "itm", 0.5, "", ""), 1000)
    found.add("00000", {}, drawn=True)
    said = {(f"{1:032x}", long): Label(f"{1:032x}", long, "web", "wrong", at_random=False)}
    words = Words()
    look = gallery.look(found, {image.place: i for i, image in enumerate(found.images)}, {}, said, words)
    place = look.texts["text"].index("y" * gallery.MAX_TEXT)
    assert look.cut == {place: 10_000}
    assert look.texts["label"][place] == 2
    assert sorted(look.texts["label"]) == [-1, -1, 2]
    assert list(words.reasons) == [("no text", "no text", False)]
    assert look.lengths["web"][:4] == [1, 1, 0, 1]


def test_a_large_run_s_pictures_are_of_a_few_shards() -> None:
    names = [f"{i:05d}" for i in range(1000)]
    chosen = gallery.chosen_shards(names)
    assert len(chosen) == gallery.MAX_SHARDS
    assert chosen == gallery.chosen_shards(reversed(names))
    assert max(chosen) > "00500"
    assert gallery.chosen_shards(names[:3]) == set(names[:3])


def test_the_closest_calls_have_thumbnails(round_: Round) -> None:
    found = counted(round_)
    chosen = gallery.wanted([found], limit=20)
    assert len(chosen) == 20
    closest = {(f"{i // 10:05d}", str(i)) for i in (46, 47, 48, 50, 51, 52, 53, 54)}
    assert closest <= chosen
    assert len(gallery.wanted([found])) == 100


def test_long_texts_leave_less_room_for_pictures(
    round_: Round, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = counted(round_)
    assert gallery.room([short]) == gallery.MAX_THUMB_BYTES
    monkeypatch.setattr(gallery, "MAX_PAGE", 100_000)
    assert 0 < gallery.room([short]) < 75_000
    many = [row(f"{i}", text="<" * 5000) for i in range(50)]  # six bytes each where they may not end an element
    tables.write(tmp_path / "long/00000.parquet", many)
    found = Counted(replace(round_, annotations=tmp_path / "long"), 1000)
    found.add("00000", {}, drawn=True)
    assert gallery.room([found]) == 0


def test_thumbnails_are_small_and_a_broken_picture_has_none(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((640, 320), 60).convert("RGB").save(buffer, "JPEG")
    made = [Sample("1", buffer.getvalue(), "jpg", "x"), Sample("2", b"no picture", "jpg", "x")]
    shards.write(tmp_path / "00000.tar", made)
    urls = {"00000": str(tmp_path / "00000.tar")}
    found = gallery.thumbnails(urls, {("00000", "1"), ("00000", "2"), ("00001", "1")})
    assert set(found) == {("00000", "1")}
    head, _, data = found["00000", "1"].partition(",")
    assert head == "data:image/webp;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (128, 64)
    assert gallery.thumbnails(urls, {("00000", "1")}, max_bytes=0) == {}
