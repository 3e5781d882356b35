"""The fence around a run folder: before anything is written there, whether its lock is still this command's.

A driver raises a fence with its lock and hands it to its workers; `confirm` then looks at the lock file itself, so a
process that was stopped or cut off, or lost its driver, finds out before it writes, by no signal that may be ignored.
What is left is the moment between that look and the write.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from capfilt.errors import LockLostError

if TYPE_CHECKING:
    from capfilt.storage.paths import StoragePath

STORE_SECONDS = 1.0
"""For so long a look at a lock on a store holds: each is two requests."""


@dataclass(frozen=True)
class WriteGuard:
    """One run folder and the lock under which this command works on it; can be pickled."""

    folder: StoragePath
    lock: StoragePath
    successor: StoragePath
    """The lock that whoever takes over would create."""
    owner: bytes
    """The first line of the lock."""

    def covers(self, where: StoragePath) -> bool:
        """Whether a place lies in the run folder."""
        if isinstance(where, Path) and isinstance(self.folder, Path):
            return where.absolute().is_relative_to(self.folder) or where.resolve().is_relative_to(self.folder.resolve())
        return not isinstance(where, Path) and where.is_relative_to(self.folder)

    def holds(self) -> bool:
        """Whether the lock is there, is ours, and nobody took over from it."""
        try:
            data = self.lock.read_bytes()
        except FileNotFoundError:
            return False
        return data.startswith(self.owner) and not self.successor.is_file()


_fences: dict[WriteGuard, float] = {}  # and when a lock on a store was last seen to hold, in monotonic seconds


def raise_fences(fences: Iterable[WriteGuard]) -> None:
    """Have what this process writes checked against these locks from now on."""
    _fences.update(dict.fromkeys(fences, float("-inf")))


def lower(fence: WriteGuard) -> None:
    """Check no more: the lock was let go."""
    _fences.pop(fence, None)


def raised() -> tuple[WriteGuard, ...]:
    """The fences of this process, for its workers."""
    return tuple(_fences)


def confirm(where: StoragePath) -> None:
    """Raise LockLostError if `where` lies in a run folder whose lock this command has lost."""
    for fence, seen in tuple(_fences.items()):
        if not fence.covers(where):
            continue
        now = time.monotonic()
        if not isinstance(fence.lock, Path) and now - seen < STORE_SECONDS:
            continue
        if not fence.holds():
            raise LockLostError(
                f"{fence.lock} was removed or taken over: another driver may be at work on {fence.folder}, so this"
                " command writes nothing more there. What it committed stays."
            )
        _fences[fence] = now
