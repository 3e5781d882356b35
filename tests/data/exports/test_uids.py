from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from capfilt.data.exports import uids
from capfilt.data.exports.form import Finished, Part
from capfilt.data.sample import Sample


@pytest.mark.parametrize("in_memory", [1, 7, 1000])
def test_parts_are_merged_sorted_and_without_repeats(tmp_path: Path, in_memory: int) -> None:
    """Whatever fits into memory at once, up to the uid of only ones, whose first digits are the last of all."""
    random = np.random.default_rng(0)
    given = [*(random.bytes(16).hex() for _ in range(40)), "f" * 32, "0" * 32, "f" * 31 + "e"]
    parts = []
    for number in range(4):
        keys = [*given[number::4], *given[:3], *given[-3:]]
        part = Part(tmp_path, number, 1, 0, 4, "")
        samples = (Sample(key, b"", "", "", {"uid": key}) for key in keys)
        parts.append(Finished(uids.write(part, samples), len(keys), 0))
    (path,) = uids.merge(tmp_path, parts, sum(part.kept for part in parts), in_memory)
    merged = np.load(path, mmap_mode="r")
    assert merged.dtype == np.dtype("u8,u8")
    assert [f"{int(high):016x}{int(low):016x}" for high, low in merged] == sorted(given)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["parts", "subset.npy"]


def test_no_uids_are_an_empty_array(tmp_path: Path) -> None:
    paths = uids.write(Part(tmp_path, 0, 1, 0, 1, ""), iter(()))
    (path,) = uids.merge(tmp_path, [Finished(paths, 0, 0)], 0)
    assert np.load(path).shape == (0,)
