"""Guards run folders: before anything is written there, check that this command still holds the folder's lock.

A driver activates a guard when it takes the lock, and passes it to its workers. `check_lock` then reads the lock file
itself, so a process that was suspended, cut off, or lost its driver finds out before it writes, without any signal.
Only the moment between that check and the write stays unguarded.
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
"""Seconds for which a check of a lock on a store is trusted: each is two requests."""


@dataclass(frozen=True)
class WriteGuard:
    """A run folder and the lock under which this command writes to it; can be pickled."""

    folder: StoragePath
    lock: StoragePath
    successor: StoragePath
    """The lock file that a driver which takes over would create."""
    owner: bytes
    """The first line of the lock file."""

    def covers(self, path: StoragePath) -> bool:
        """Whether a path lies in the run folder."""
        if isinstance(path, Path) and isinstance(self.folder, Path):
            return path.absolute().is_relative_to(self.folder) or path.resolve().is_relative_to(self.folder.resolve())
        return not isinstance(path, Path) and path.is_relative_to(self.folder)

    def is_held(self) -> bool:
        """Whether the lock file exists, names this command, and no successor exists."""
        try:
            data = self.lock.read_bytes()
        except FileNotFoundError:
            return False
        return data.startswith(self.owner) and not self.successor.is_file()


_guards: dict[WriteGuard, float] = {}  # with the time of the last check that passed, in monotonic seconds


def activate(guards: Iterable[WriteGuard]) -> None:
    """Check everything that this process writes against these locks from now on."""
    _guards.update(dict.fromkeys(guards, float("-inf")))


def activate_only(guards: Iterable[WriteGuard]) -> None:
    """The same in a process that has served another driver's lock before, which may be released by now."""
    _guards.clear()
    activate(guards)


def deactivate(guard: WriteGuard) -> None:
    """End the checks of a lock that was released."""
    _guards.pop(guard, None)


def active_guards() -> tuple[WriteGuard, ...]:
    """The guards of this process, to pass to its workers."""
    return tuple(_guards)


def check_lock(path: StoragePath) -> None:
    """Raise LockLostError if `path` lies in a run folder whose lock this command has lost."""
    for guard, checked_at in tuple(_guards.items()):
        if not guard.covers(path):
            continue
        now = time.monotonic()
        if not isinstance(guard.lock, Path) and now - checked_at < STORE_SECONDS:
            continue
        if not guard.is_held():
            raise LockLostError(
                f"{guard.lock} was removed or taken over: another driver may be at work on {guard.folder}, so this"
                " command writes nothing more there. What it committed stays."
            )
        _guards[guard] = now
