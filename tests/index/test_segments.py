"""Segments: any range of keys out of several blocks, and files that are damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from capfilt.errors import RunError
from capfilt.index import segments
from capfilt.storage.paths import storage_path

KIND = np.dtype([("row", "<i8"), ("value", "<f2", (3,))])


def blocks(folder: Any, num: int = 3) -> tuple[list[Any], np.ndarray, np.ndarray]:
    """Files of blocks, and all keys and records in the order of the blocks."""
    draw, paths = np.random.default_rng(0), []
    keys, records = np.sort(draw.integers(0, 7, (num, 20)), axis=1), np.zeros((num, 20), KIND)
    records["row"] = np.arange(num * 20).reshape(num, 20)
    for number in range(num):
        segments.write(folder / f"{number}.bin", keys[number], records[number], 8)
        paths.append(folder / f"{number}.bin")
    return paths, keys.ravel(), records.ravel()


@pytest.mark.parametrize("kind", ["folder", "store"])
def test_every_range_of_keys(kind: str, tmp_path: Path) -> None:
    where: Any = tmp_path if kind == "folder" else storage_path(f"memory://{tmp_path.name}/index")
    paths, keys, records = blocks(where)
    order = np.argsort(keys, kind="stable")
    for first in range(8):
        for last in range(first + 1, 9):
            here = order[(keys[order] >= first) & (keys[order] < last)]
            got = segments.read(paths, first, last)
            assert np.array_equal(got[0], keys[here])
            assert np.array_equal(got[1], records[here])
    whole = segments.read(paths, 2, 3)[1]
    parts = [segments.read(paths, 2, 3, start, start + 4)[1] for start in range(0, len(whole), 4)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert len(parts) > 1
    one = segments.Segment(paths[0])
    assert np.array_equal(one.mapped(3, 9), one.records(3, 9))
    assert len(one) == 20


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    path = blocks(tmp_path)[0][0]
    whole = path.read_bytes()
    for size in (0, 40, 200, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(RunError, match="damaged or not there"):
            segments.read([path], 0, 8)
        with pytest.raises(RunError, match="damaged or not there"):
            segments.Segment(path).mapped(0, 20)
    header = "{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000000000,), }"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode())
    with pytest.raises(RunError, match="damaged or not there"):
        segments.arrays(path, 1)
    path.unlink()
    with pytest.raises(RunError, match="damaged or not there"):
        segments.Segment(path)
