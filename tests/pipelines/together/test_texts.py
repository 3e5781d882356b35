"""What counts as a text, and where each comes from, through all stages."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from capfilt.data import shards
from capfilt.data.sample import Sample


def models(finished_run: Path) -> list[str]:
    return ["--captioner", str(finished_run / "round-1/captioner"), "--filter", str(finished_run / "round-1/filter")]


def result(done: Any) -> Any:
    assert done.code == 0, done.err
    return json.loads(done.out)


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def samples_of(path: Path) -> list[Sample]:
    found = list(shards.read(str(path)))
    assert all(isinstance(item, Sample) for item in found)
    return found  # type: ignore[return-value]


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory, picture: Any) -> Path:
    """40 pictures; every other one has no text, or a txt of punctuation."""
    texts = ["", "a red picture", "...", "a green one"]
    made = [Sample(f"{k:03d}", picture("PNG", seed=k), "png", texts[k % 4]) for k in range(40)]
    path = tmp_path_factory.mktemp("half") / "half.tar"
    shards.write(path, made)
    return path


@pytest.fixture(scope="module")
def annotated(half: Path, finished_run: Path, capfilt: Any) -> Path:
    out = half.parent / "a"
    answer = result(capfilt("annotate", half, *models(finished_run), "--out", out, "--json"))
    assert answer["texts"] == {
        "in": {"web": 40, "synthetic": 40},
        "kept": {"web": 20, "synthetic": 40},
        "dropped": {"web: no text": 20},
    }
    return out


def test_what_is_no_text_has_a_row_and_no_score(annotated: Path) -> None:
    rows = [row for row in rows_of(annotated / "annotations/half.parquet") if row["source"] == "web"]
    assert len(rows) == 40
    for row in rows:
        bare = row["text"] in ("", "...")
        assert (row["itm"] is None, row["itc"] is None) == (bare, bare)
        assert (row["status"], row["reason"]) == ("ok", "no text" if bare else "")


def test_a_share_of_the_texts_is_a_share_of_what_can_be_read(
    half: Path, annotated: Path, capfilt: Any, tmp_path: Path
) -> None:
    """24 of 60: 20 of the web, 40 written; 12 were kept while empty texts filled the quota."""
    words = ("--set", "threshold=keep-rate", "--set", "keep_rate=0.4")
    answer = result(capfilt("select", half, "--annotations", annotated, "--out", tmp_path / "b", *words, "--json"))
    assert sum(answer["texts"]["kept"].values()) == 24
    assert answer["texts"]["in"] == {"web": 40, "synthetic": 40}
    assert answer["texts"]["dropped"]["web: no text"] == 20
    judged = rows_of(tmp_path / "b/dataset/half.parquet")
    assert {row["why"] for row in judged if row["text"] in ("", "...")} == {"no text"}
    for sample in samples_of(tmp_path / "b/dataset/half.tar"):
        assert len(sample.text) > 3
    assert capfilt("verify", tmp_path / "b", address=None).code == 0
    report = result(capfilt("report", tmp_path / "b", "--json", address=None))
    assert report["texts"] == 60


def test_pictures_without_a_text_are_left_out_of_trainings_and_figures(
    half: Path, finished_run: Path, capfilt: Any, tmp_path: Path, model_yaml: Path
) -> None:
    few = ("--set", "train.steps=2", "--set", "train.loader.batch_size=8", "--set", f"model={model_yaml}")
    words = ("pretrain", "blip-tiny", "--out", tmp_path / "p", *few, "--set", f"data={half}")
    done = capfilt(*words)
    assert done.code == 0, done.err
    assert "20 pictures have no text: they are not trained on" in done.err
    assert result(capfilt(*words, "--json"))["without_text"] == 20, "a rerun says so too"
    capfilt("report", tmp_path / "p", address=None)
    assert "20 pictures have no text: they were not trained on." in (tmp_path / "p/report.html").read_text()
    answer = result(capfilt("evaluate", finished_run / "round-1/pretrain", half, "--json"))
    assert answer["without_text"] == 20
    assert answer["retrieval"].keys() >= {"tr@1", "ir@1"}


def test_each_text_keeps_where_it_comes_from(finished_run: Path, tmp_path: Path, capfilt: Any, picture: Any) -> None:
    """Annotated, selected, annotated again: what a captioner wrote stays its own, with the round that wrote it."""
    captions = [
        {"text": "a red square", "source": "human"},
        {"text": "written before", "source": "synthetic", "itm": 0.9, "itc": 0.1, "round": 7},
        {"text": "IMG_0042", "source": "web", "round": 7},
        {"text": "red", "source": "synthetic", "round": "last"},
    ]
    meta = {"captions": captions, "clip": float("1e3")}
    shards.write(tmp_path / "web/00000.tar", [Sample("a", picture("PNG"), "png", "written before", meta)])
    came = [("human", 0, "a red square"), ("web", 0, "IMG_0042")]
    came += [("synthetic", 0, "written before"), ("synthetic", 1, "red")]
    for number in (1, 2):
        source, out = tmp_path / ("web" if number == 1 else "b1/dataset"), tmp_path / f"a{number}"
        answer = result(capfilt("annotate", source, *models(finished_run), "--out", out, "--json"))
        assert answer["texts"]["in"] == {"human": 1, "web": 1, "synthetic": 2 + number}
        rows = {(row["source"], row["candidate"]): row for row in rows_of(out / "annotations/00000.parquet")}
        assert {(*place, rows[place]["text"]) for place in rows} >= set(came)
        assert rows.keys() == {place[:2] for place in came} | {("synthetic", i + 2) for i in range(number)}
        rounds = {place: row["round"] for place, row in rows.items()}
        assert rounds == {**dict.fromkeys(rows, 0), ("synthetic", 0): 7}
        newest = ("synthetic", 1 + number)
        assert {place for place, row in rows.items() if row["captioner"]} == {newest}, "who wrote the others is unknown"
        words = ("--annotations", out, "--out", tmp_path / f"b{number}", "--set", "threshold=null", "--json")
        assert result(capfilt("select", source, *words))["texts"]["kept"] == answer["texts"]["in"]
        assert capfilt("verify", tmp_path / f"b{number}", address=None).code == 0
    (sample,) = samples_of(tmp_path / "b2/dataset/00000.tar")
    assert [(c["source"], c["round"]) for c in sample.meta["captions"]] == [
        ("human", 0), ("synthetic", 7), ("synthetic", 0), ("synthetic", 0), ("synthetic", 0), ("web", 0),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, picture: Any) -> Path:
    """Two folders with a 00000.tar each, of one size and from one second, and a 00001.tar in one of them."""
    folder = tmp_path_factory.mktemp("parts")
    for number, (name, count) in enumerate((("p0/00000", 4), ("p1/00000", 3), ("p1/00001", 2))):
        colour = ("red", "green", "blue")[number]
        made = [
            Sample(f"{colour}{k}", picture("PNG", colour=colour, seed=k), "png", f"a {colour} picture")
            for k in range(count)
        ]
        path = folder / f"{name}.tar"
        shards.write(path, made)
        path.write_bytes(path.read_bytes().ljust(40960, b"\0"))
        os.utime(path, (1e9, 1e9))
    return folder


@pytest.fixture(scope="module")
def joined(parts: Path, finished_run: Path, capfilt: Any) -> Path:
    words = ("annotate", f"{parts}/p0::{parts}/p1", *models(finished_run), "--out", parts / "a", "--json")
    assert result(capfilt(*words))["samples"] == {"in": 9, "kept": 9, "dropped": 0, "failed": 0}
    return parts / "a"


def selected(capfilt: Any, spec: str, source: Path, out: Path, *more: str) -> Any:
    done = capfilt("select", spec, "--annotations", source, "--out", out, "--json", *more)
    answer = result(done)
    looked = result(capfilt("verify", out, "--inputs", "--json", address=None))
    assert (looked["broken"], looked["inputs"]["changed"]) == ([], [])
    assert looked["inputs"]["compared"] == looked["shards"] > 0
    return answer


def test_folders_with_shards_of_one_name_are_one_data_set(
    joined: Path, parts: Path, capfilt: Any, tmp_path: Path
) -> None:
    names = ["00001", "p0-00000", "p1-00000"]
    assert sorted(path.stem for path in (joined / "annotations").iterdir()) == names
    assert [row["key"] for row in rows_of(joined / "annotations/p1-00000.parquet")[::2]] == [
        "green0",
        "green1",
        "green2",
    ]
    any_score = ("--set", "threshold=null")
    answer = selected(capfilt, f"{parts}/p1::{parts}/p0", joined, tmp_path / "b", *any_score)
    assert answer["samples"]["kept"] == 9
    sizes = {"00001.tar": 2, "p0-00000.tar": 4, "p1-00000.tar": 3}
    assert json.loads((tmp_path / "b/dataset/sizes.json").read_text()) == sizes
    assert {path.name: len(samples_of(path)) for path in (tmp_path / "b/dataset").glob("*.tar")} == sizes
    answer = result(capfilt("explain", tmp_path / "b", "green1", "--json", address=None))
    assert [found["shard"] for found in answer["found"]] == ["p1-00000"]
    result(capfilt("report", tmp_path / "b", "--json", address=None))
    assert "of 9 images have a thumbnail" not in (tmp_path / "b/report.html").read_text()
    # Some of them, which on their own would be called otherwise.
    answer = selected(capfilt, f"{parts}/p1", joined, tmp_path / "c", *any_score)
    assert answer["samples"]["kept"] == 5
    assert (tmp_path / "c/dataset/p1-00000.tar").read_bytes() == (tmp_path / "b/dataset/p1-00000.tar").read_bytes()
    assert capfilt("report", tmp_path / "c", address=None).code == 0


def test_shards_that_nothing_but_their_folder_tells_apart_are_counted_apart(
    parts: Path, tmp_path: Path, capfilt: Any, model_yaml: Path
) -> None:
    few = ("--set", "train.steps=2", "--set", "train.loader.batch_size=4", "--set", f"model={model_yaml}")
    words = ("pretrain", "blip-tiny", "--out", tmp_path / "p", *few, "--set", f"data={parts}/p0::{parts}/p1", "--json")
    result(capfilt(*words))
    counted = [json.loads(path.read_text())["tally"] for path in (tmp_path / "p/ledger/rows").iterdir()]
    assert sorted(tally["samples"]["in"] for tally in counted) == [2, 3, 4]


def test_a_shard_of_which_nothing_is_kept_has_no_tar(joined: Path, parts: Path, capfilt: Any, tmp_path: Path) -> None:
    best = {path.stem: max(row["itm"] for row in rows_of(path)) for path in (joined / "annotations").glob("*.parquet")}
    worst, *_, highest = sorted(best, key=best.__getitem__)
    threshold = f"threshold={best[highest]!r}"
    spec, out = f"{parts}/p0::{parts}/p1", tmp_path / "b"
    answer = selected(capfilt, spec, joined, out, "--set", threshold)
    assert answer["samples"]["in"] == 9
    assert [path.stem for path in (out / "dataset").glob("*.tar")] == [highest]
    assert json.loads((out / "dataset/sizes.json").read_text()).keys() == {f"{highest}.tar"}
    assert {path.stem for path in (out / "dataset").glob("*.parquet")} == set(best)
    status = result(capfilt("status", out, "--json", address=None))
    assert [(stage["done"], stage["total"]) for stage in status["stages"]] == [(3, 3)]
    assert result(capfilt("report", out, "--json", address=None))["texts"] == 18
    # A tar of before, of the same place, is not left behind.
    completion = out / f"ledger/select/{worst}.json"
    completion.unlink()
    (out / f"dataset/{worst}.tar").write_bytes(b"old")
    selected(capfilt, spec, joined, out, "--set", threshold)
    assert completion.is_file()
    assert not (out / f"dataset/{worst}.tar").exists()
