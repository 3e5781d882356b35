"""Records of a block of rows, sorted by key, so that those of any range of keys are one range of bytes.

This is how vectors that do not fit memory are brought together by list: each block of shards is written once, in the
order of the lists, and who joins or searches some lists reads one slice of every block.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from capfilt.errors import RunError
from capfilt.storage import safe_paths
from capfilt.storage.atomic import atomic
from capfilt.storage.paths import StoragePath


def write(path: StoragePath, keys: np.ndarray, records: np.ndarray, num_keys: int) -> None:
    """Write the records of a block, atomically: int64 [N] of 0..num_keys-1, and a structured array [N].

    Two arrays in numpy's format in one file: how many records each key has, and the records.
    """
    order = np.argsort(keys, kind="stable")
    with atomic(path) as file:
        np.save(file, np.bincount(keys, minlength=num_keys).astype(np.int64))
        np.save(file, records[order])


class Segment:
    """What `write` wrote. Reads of it are slices; on this machine the file is mapped into memory."""

    def __init__(self, path: StoragePath) -> None:
        """Read how many records each key has. RunError for a damaged file."""
        self.path = path
        try:
            with _open(path) as file:
                self.counts: np.ndarray = np.load(file, allow_pickle=False)
                np.lib.format.read_magic(file)
                _, _, self.kind = np.lib.format.read_array_header_1_0(file)
                self._begin = file.tell()
        except (ValueError, EOFError, OSError) as error:
            raise _damaged(path) from error
        self._ends = np.concatenate([[0], np.cumsum(self.counts)])
        self._mapped: np.ndarray | None = None

    def __len__(self) -> int:
        return int(self._ends[-1])

    def span(self, first: int, last: int) -> tuple[int, int]:
        """Where the records of `first <= key < last` begin and end."""
        return int(self._ends[first]), int(self._ends[last])

    def records(self, start: int, stop: int) -> np.ndarray:
        """Some of the records. RunError where the file has fewer."""
        try:
            with _open(self.path) as file:
                file.seek(self._begin + start * self.kind.itemsize)
                data = file.read((stop - start) * self.kind.itemsize)
            return np.frombuffer(data, self.kind, stop - start)
        except ValueError as error:
            raise _damaged(self.path) from error

    def mapped(self, start: int, stop: int) -> np.ndarray:
        """`records` of a file that is searched again and again."""
        if not isinstance(self.path, Path):
            return self.records(start, stop)
        if self._mapped is None:
            if safe_paths.check_file(self.path).stat().st_size < self._begin + len(self) * self.kind.itemsize:
                raise _damaged(self.path)
            self._mapped = np.memmap(self.path, self.kind, "r", self._begin, (len(self),))
        return np.asarray(self._mapped[start:stop])


def read(
    paths: Sequence[StoragePath], first: int, last: int, start: int = 0, stop: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The keys and records of `first <= key < last`, sorted by key and for each in the order of the blocks.

    With one key, `start` and `stop` choose a part of its records.
    """
    parts, before = [], 0
    for segment in map(Segment, paths):
        begin, end = segment.span(first, last)
        after = before + end - begin
        low, high = (min(max(edge, before), after) - before for edge in (start, after if stop is None else stop))
        keys = np.repeat(np.arange(first, last), segment.counts[first:last])[low:high]
        parts.append((keys, segment.records(begin + low, begin + high)))
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


def _open(path: StoragePath) -> Any:
    return safe_paths.open_file(path) if isinstance(path, Path) else path.open("rb")


def _damaged(path: StoragePath) -> RunError:
    return RunError(f"{path} is damaged or not there; remove it and run the command again.")
