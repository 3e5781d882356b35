"""Records of a block of rows, sorted by key, so that those of any range of keys are one range of bytes.

This is how vectors that do not fit memory are brought together by list: each block of shards is written once, in the
order of the lists, and who joins some lists reads one slice of every block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np

from capfilt.errors import RunError
from capfilt.storage import safe_paths
from capfilt.storage.atomic import atomic
from capfilt.storage.paths import StoragePath
from capfilt.storage.remote_path import RemotePath


def write(path: StoragePath, keys: np.ndarray, records: np.ndarray, num_keys: int) -> None:
    """Write the records of a block, atomically: int64 [N] of 0..num_keys-1, and a structured array [N].

    Two arrays in numpy's format in one file: how many records each key has, and the records.
    """
    order = np.argsort(keys, kind="stable")
    with atomic(path) as file:
        np.save(file, np.bincount(keys, minlength=num_keys).astype(np.int64))
        np.save(file, records[order])


def counts(path: StoragePath) -> np.ndarray:
    """How many records each key has, int64 [num_keys]."""
    return arrays(path, 1)[0]


def read(
    paths: Sequence[StoragePath], first: int, last: int, start: int = 0, stop: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The keys and records of `first <= key < last`, sorted by key and for each in the order of the blocks.

    With one key, `start` and `stop` choose a part of its records.
    """
    parts, before = [], 0
    for path in paths:
        with _open(path) as file:
            sizes = _load(file, path)
            ends = before, before + int(sizes[first:last].sum())
            low, high = (min(max(edge, ends[0]), ends[1]) for edge in (start, ends[1] if stop is None else stop))
            keys = np.repeat(np.arange(first, last), sizes[first:last])[low - before : high - before]
            parts.append((keys, _records(file, path, int(sizes[:first].sum()) + low - before, high - low)))
            before = ends[1]
    keys, records = (np.concatenate(column) for column in zip(*parts, strict=True))
    if last == first + 1:
        return keys, records
    order = np.argsort(keys, kind="stable")
    return keys[order], records[order]


def arrays(path: StoragePath, count: int) -> list[np.ndarray]:
    """The arrays that were saved one after another in a file. RunError for a damaged one."""
    with _open(path) as file:
        return [_load(file, path) for _ in range(count)]


def _load(file: BinaryIO, path: StoragePath) -> np.ndarray:
    try:
        array: np.ndarray = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise _damaged(path) from error
    return array


def _records(file: BinaryIO, path: StoragePath, start: int, count: int) -> np.ndarray:
    """Some records of the array at which the file stands."""
    try:
        np.lib.format.read_magic(file)
        _, _, kind = np.lib.format.read_array_header_1_0(file)
        file.seek(start * kind.itemsize, 1)
        data = file.read(count * kind.itemsize)
        return np.frombuffer(data, kind, count)
    except ValueError as error:  # too few bytes, too
        raise _damaged(path) from error


def _open(path: StoragePath) -> Any:
    return path.open("rb") if isinstance(path, RemotePath) else safe_paths.open_file(path)


def _damaged(path: StoragePath) -> RunError:
    return RunError(f"{path} is damaged; remove it and run the command again.")
