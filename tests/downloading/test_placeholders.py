from __future__ import annotations

import json
import tarfile
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capfilt.downloading.placeholders import count_repeated, drop
from capfilt.runs.tally import Tally


def digest(name: str) -> str:
    return sha256(name.encode()).hexdigest()


def write(folder: Path, shard: str, names: list[str | None]) -> Path:
    """A shard whose pictures' bytes are their names; None failed."""
    keys = [f"{shard}{i:03d}" for i in range(len(names))]
    table = pa.table(
        {
            "caption": [f"t{i}" for i in range(len(names))],
            "key": keys,
            "status": ["failed_to_download" if name is None else "success" for name in names],
            "error_message": pa.array(["dns: none" if name is None else None for name in names], pa.string()),
            "sha256": pa.array([None if name is None else digest(name) for name in names], pa.string()),
        }
    )
    pq.write_table(table, folder / f"{shard}.parquet")
    with tarfile.open(folder / f"{shard}.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for key, name in zip(keys, names, strict=True):
            for part in ("jpg", "txt") if name is not None else ():
                path = folder / "member"
                path.write_text(name or "")
                tar.add(path, f"{key}.{part}")
                path.unlink()
    times = {"duration": 1, "start_time": 2, "end_time": 3}
    (folder / f"{shard}_stats.json").write_text(json.dumps(times))
    return folder / f"{shard}.parquet"


@pytest.mark.parametrize("in_memory", [1, 4, 1000])
def test_repeated_pictures_are_counted_over_all_shards(tmp_path: Path, in_memory: int) -> None:
    paths = [write(tmp_path, "00", ["a", "b", "a", None, "c"]), write(tmp_path, "01", ["a", "b", "d", "a"])]
    assert count_repeated(paths, 10, in_memory=in_memory) == {digest("a"): 4, digest("b"): 2}
    assert count_repeated(paths, 1, in_memory=in_memory) == {digest("a"): 4}
    assert count_repeated(paths, 1, min_count=2, in_memory=in_memory) == {digest("a"): 4, digest("b"): 2}
    assert count_repeated(paths, 1, min_count=3, in_memory=in_memory) == {digest("a"): 4}


def test_nothing_repeated(tmp_path: Path) -> None:
    assert count_repeated([write(tmp_path, "00", ["a", None]), write(tmp_path, "01", [None])], 10) == {}


def test_what_is_dropped_becomes_a_failure_and_is_still_counted(tmp_path: Path) -> None:
    parquet = write(tmp_path, "00", ["a", "b", "a", None])
    before = count_repeated([parquet], 10)
    committed: list[Any] = []
    assert drop(tmp_path, "00", Counter({digest("a"): 2}), lambda *what: committed.append(what)) == 2
    table = pq.read_table(parquet)
    assert table["status"].to_pylist() == ["failed_to_download", "success", *["failed_to_download"] * 2]
    assert table["error_message"].to_pylist() == [
        "placeholder: the same bytes under 2 URLs", None, "placeholder: the same bytes under 2 URLs", "dns: none",
    ]  # fmt: skip
    with tarfile.open(tmp_path / "00.tar") as tar:
        assert tar.getnames() == ["00001.jpg", "00001.txt"]
        assert tar.extractfile("00001.jpg").read() == b"b"  # type: ignore[union-attr]
    [(outputs, tally)] = committed
    assert [path.name for path in outputs] == ["00.tar", "00.parquet", "00_stats.json"]
    assert isinstance(tally, Tally)
    assert not tally.imbalance()
    assert tally.failed == {"placeholder": 2, "dns": 1}
    stats = json.loads((tmp_path / "00_stats.json").read_text())
    assert (stats["count"], stats["successes"], stats["status_dict"]["placeholder"]) == (4, 1, 2)
    assert count_repeated([parquet], 10) == before
    assert drop(tmp_path, "00", Counter({digest("a"): 2}), lambda *what: committed.append(what)) == 0
    assert len(committed) == 1
