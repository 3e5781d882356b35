"""Annotations and shards, read by whoever has a folder of them."""

from __future__ import annotations

from pathlib import Path

import pytest

import capfilt
from capfilt.data import shards


@pytest.mark.parametrize(("place", "has_verdicts"), [("round-1", True), ("round-1/annotations", False)])
def test_annotations_of_a_folder(place: str, has_verdicts: bool, finished_run: Path) -> None:
    read = capfilt.read_annotations(finished_run / place)
    rows = list(read)
    assert len(rows) == len(list(read)) == 120, "it can be walked again"
    assert isinstance(rows[0], capfilt.Annotation)
    assert {row.source for row in rows} == {"web", "synthetic"}
    assert ("verdict" in read.to_arrow().column_names) is has_verdicts
    assert read.to_arrow().num_rows == 120
    if has_verdicts:
        assert {row.verdict for row in read.verdicts()} == {"kept", "dropped"}
        assert all(bool(row.why) == (row.verdict == "dropped") for row in read.verdicts())
    else:
        with pytest.raises(capfilt.DataError, match="has no verdicts: it is what `annotate` wrote"):
            next(read.verdicts())


def test_annotations_of_one_shard(finished_run: Path) -> None:
    path = finished_run / "round-1/annotations/00001.parquet"
    assert capfilt.read_annotations(str(path)).files == (path,)
    assert len(list(capfilt.read_annotations(path))) == 40


def test_no_annotations(tmp_path: Path) -> None:
    with pytest.raises(capfilt.DataError, match="holds no annotations"):
        capfilt.read_annotations(tmp_path)


@pytest.mark.parametrize("spec", ["data/web", "data/web/{00000..00002}.tar", "data/web/*.tar"])
def test_samples_of_shards(spec: str, finished_run: Path) -> None:
    read = list(capfilt.read_shards(str(finished_run / spec)))
    assert len(read) == 60
    assert read[0].image
    assert len(read[0].uid) == 32


def test_several_specs_at_once(finished_run: Path) -> None:
    assert len(list(capfilt.read_shards([finished_run / "data/web/00000.tar", finished_run / "data/test"]))) == 32


def test_what_cannot_be_read_is_raised_or_handed_over(tmp_path: Path, finished_run: Path) -> None:
    good = next(capfilt.read_shards(finished_run / "data/web"))
    whole = tmp_path / "00000.tar"
    shards.write(whole, [good, capfilt.Sample("b", good.image, good.extension, "b")])
    data = whole.read_bytes()
    whole.write_bytes(data[: len(data) // 2])
    with pytest.raises(capfilt.ShardError, match="give on_failed to go on without it"):
        list(capfilt.read_shards(whole))
    failed: list[capfilt.FailedSample] = []
    read = list(capfilt.read_shards(whole, on_failed=failed.append))
    assert len(read) + len(failed) >= 1
    assert failed[-1].reason


def test_a_spec_that_names_nothing_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(capfilt.ShardError):
        capfilt.read_shards(tmp_path / "nowhere.tar")
