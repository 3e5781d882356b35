"""Records of a block of rows, sorted by key, so that those of any range of keys are one range of bytes.

This is how vectors that do not fit memory are brought together by list: each block of shards is written once, in the
order of the lists, and who joins or searches some lists reads one slice of every block.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from capfilt.errors import RunError
from capfilt.storage import safe_paths
from capfilt.storage.atomic import atomic
from capfilt.storage.paths import StoragePath


def write(path: StoragePath, keys: np.ndarray, records: np.ndarray, num_keys: int) -> None:
    """Write the records of a block, atomically: int64 [N] of 0..num_keys-1, and a structured array [N].

    Two arrays in numpy's format in one file: where the records of each key begin, and the records.
    """
    order = np.argsort(keys, kind="stable")
    with atomic(path) as file:
        np.save(file, np.concatenate([[0], np.cumsum(np.bincount(keys, minlength=num_keys))]).astype(np.int64))
        np.save(file, records[order])


class Segment:
    """What `write` wrote. Of a file only what is asked for is read: there are thousands, each with many keys."""

    def __init__(self, path: StoragePath) -> None:
        """Read what is in the file. RunError for a damaged one."""
        self.path = path
        try:
            with _open(path) as file:
                (self._num_edges, edge), self._edges_at = _header(file), file.tell()
                file.seek(self._num_edges * edge.itemsize, 1)
                (self._num, self.kind), self._records_at = _header(file), file.tell()
        except (ValueError, EOFError, OSError) as error:
            raise _damaged(path) from error
        self._mapped: np.ndarray | None = None

    def __len__(self) -> int:
        return self._num

    @cached_property
    def edges(self) -> np.ndarray:
        """Where the records of each key begin, and at last where those of the last end, int64 [num_keys + 1]."""
        return self._read(self._edges_at, np.dtype(np.int64), 0, self._num_edges)

    def edges_of(self, first: int, last: int) -> np.ndarray:
        """`edges[first : last + 1]`, of which no more is read."""
        return self._read(self._edges_at, np.dtype(np.int64), first, last + 1)

    def records(self, start: int, stop: int) -> np.ndarray:
        return self._read(self._records_at, self.kind, start, stop)

    def mapped(self, start: int, stop: int) -> np.ndarray:
        """`records` of a file that is searched again and again: on this machine it is mapped into memory."""
        if not isinstance(self.path, Path):
            return self.records(start, stop)
        if self._mapped is None:
            if safe_paths.check_file(self.path).stat().st_size < self._records_at + len(self) * self.kind.itemsize:
                raise _damaged(self.path)
            self._mapped = np.memmap(self.path, self.kind, "r", self._records_at, (len(self),))
        return np.asarray(self._mapped[start:stop])

    def _read(self, at: int, kind: np.dtype[Any], start: int, stop: int) -> np.ndarray:
        try:
            with _open(self.path) as file:
                file.seek(at + start * kind.itemsize)
                return np.frombuffer(file.read((stop - start) * kind.itemsize), kind, stop - start)
        except (ValueError, OSError) as error:  # ValueError: there are fewer
            raise _damaged(self.path) from error


def read(
    paths: Sequence[StoragePath], first: int, last: int, start: int = 0, stop: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The keys and records of `first <= key < last`, sorted by key and for each in the order of the blocks.

    With one key, `start` and `stop` choose a part of its records.
    """
    parts, before = [], 0
    for segment in map(Segment, paths):
        edges = segment.edges_of(first, last)
        after = before + int(edges[-1] - edges[0])
        low, high = (min(max(edge, before), after) - before for edge in (start, after if stop is None else stop))
        keys = np.repeat(np.arange(first, last), np.diff(edges))[low:high]
        parts.append((keys, segment.records(int(edges[0]) + low, int(edges[0]) + high)))
        before = after
    keys, records = (np.concatenate(column) for column in zip(*parts, strict=True))
    if last == first + 1:
        return keys, records
    order = np.argsort(keys, kind="stable")
    return keys[order], records[order]


def arrays(path: StoragePath, count: int) -> list[np.ndarray]:
    """The arrays that were saved one after another in a file. RunError for a damaged one."""
    try:
        with _open(path) as file:
            return [np.load(file, allow_pickle=False) for _ in range(count)]
    except (ValueError, EOFError, OSError) as error:
        raise _damaged(path) from error


def _header(file: Any) -> tuple[int, np.dtype[Any]]:
    """How many values of which type the array has at whose beginning the file stands."""
    np.lib.format.read_magic(file)
    shape, _, kind = np.lib.format.read_array_header_1_0(file)
    return int(shape[0]), kind


def _open(path: StoragePath) -> Any:
    return safe_paths.open_file(path) if isinstance(path, Path) else path.open("rb")


def _damaged(path: StoragePath) -> RunError:
    return RunError(f"{path} is damaged or not there; remove it and run the command again.")
