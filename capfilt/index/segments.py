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
    with _open(path) as file:
        return _counts(file, path)


def read(paths: Sequence[StoragePath], first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """The keys and records of `first <= key < last`, sorted by key and for each in the order of the blocks."""
    parts = [_slice(path, first, last) for path in paths]
    keys, records = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(keys, kind="stable")
    return keys[order], records[order]


def _slice(path: StoragePath, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    with _open(path) as file:
        sizes = _counts(file, path)
        kind, num = _header(file, path)
        start, stop = int(sizes[:first].sum()), int(sizes[:last].sum())
        file.seek(start * kind.itemsize, 1)
        data = file.read((stop - start) * kind.itemsize)
    if sizes.sum() != num or len(data) != (stop - start) * kind.itemsize:
        raise _damaged(path)
    return np.repeat(np.arange(first, last), sizes[first:last]), np.frombuffer(data, kind)


def _counts(file: BinaryIO, path: StoragePath) -> np.ndarray:
    try:
        sizes: np.ndarray = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise _damaged(path) from error
    return sizes


def _header(file: BinaryIO, path: StoragePath) -> tuple[np.dtype[Any], int]:
    try:
        np.lib.format.read_magic(file)
        shape, _, kind = np.lib.format.read_array_header_1_0(file)
    except ValueError as error:
        raise _damaged(path) from error
    return kind, int(shape[0])


def _open(path: StoragePath) -> Any:
    return path.open("rb") if isinstance(path, RemotePath) else safe_paths.open_file(path)


def _damaged(path: StoragePath) -> RunError:
    return RunError(f"{path} is damaged; remove it and run the command again.")
