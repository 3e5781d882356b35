"""datacomp-npy: the uids that DataComp's resharder takes as a subset, a sorted array of pairs of 64-bit integers.

The resharder writes a sample as often as its uid stands in the array, so each uid stands there once.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np

from capfilt.data.exports.form import Finished, Form, Part
from capfilt.data.sample import Sample
from capfilt.storage.atomic import atomic
from capfilt.storage.paths import StoragePath, map_concurrent
from capfilt.storage.remote_path import RemotePath

PAIRS = np.dtype("u8,u8")
"""The first and the second 16 hex digits of a uid."""
IN_MEMORY = 4_000_000
"""Uids that are sorted at once."""
MAX_FILES = 256


def write(part: Part, samples: Iterator[Sample]) -> list[StoragePath]:
    """The uids of a part, in the order of the samples."""
    uids = [(int(sample.uid[:16], 16), int(sample.uid[16:], 16)) for sample in samples]
    path = part.out / "parts" / f"{part.name()}.npy"
    with atomic(path) as file:
        np.save(file, np.array(uids, PAIRS))
    return [path]


def merge(out: StoragePath, parts: Iterable[Finished], total: int, in_memory: int = IN_MEMORY) -> list[StoragePath]:
    """One sorted array, without holding it: uids are put into files by their first digits, and each of these is sorted.

    `in_memory`: uids that such a file should have.
    """
    num = min(MAX_FILES, total // in_memory + 1)
    path, scratch = out / "subset.npy", out if isinstance(out, Path) else None
    paths = (part.files[0] for part in parts)
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile(dir=scratch)) for _ in range(num)]
        for array in map_concurrent(_load, paths, isinstance(out, RemotePath)):
            which = (array["f0"] >> np.uint64(32)) * np.uint64(num) >> np.uint64(32)
            for number in np.unique(which):
                files[number].write(array[which == number].tobytes())
        count = sum(map(_sort, files))
        with atomic(path) as merged:
            header = {"descr": np.lib.format.dtype_to_descr(PAIRS), "fortran_order": False, "shape": (count,)}
            np.lib.format.write_array_header_1_0(merged, header)
            for file in files:
                shutil.copyfileobj(file, merged)
    return [path]


def _load(path: StoragePath) -> np.ndarray:
    with path.open("rb") as file:
        array: np.ndarray = np.load(file, allow_pickle=False)
    return array


def _sort(file: IO[Any]) -> int:
    """Sort a file of uids, drop those that come again, and go to its beginning; returns how many there are."""
    file.seek(0)
    array = np.frombuffer(file.read(), PAIRS)
    array = array[np.lexsort((array["f1"], array["f0"]))]
    array = array[np.append(True, array[1:] != array[:-1])] if len(array) else array
    file.seek(0)
    file.truncate()
    file.write(array.tobytes())
    file.seek(0)
    return len(array)


DATACOMP = Form(write, merge, needs_text=False, reads="uids")
