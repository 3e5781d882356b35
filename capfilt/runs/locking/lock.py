"""One driver a run folder: takes its lock, keeps the heartbeat, and takes over the lock of a dead driver.

It rests on creating a file that must not exist, which shared file systems and stores (by a conditional PUT) do exactly,
and not on flock, which they forget. A lock is never overwritten: lock-2.json takes over from lock-1.json, and the
highest number is the lock; on a store it lies in `lock/` of the run. A number may be used again, since a heartbeat can
only be written by its own lock. What remains is the moment between a driver's last check of its lock and its removal of
it: it may then remove the lock of a third driver, which stops.

A driver that loses its lock writes nothing more (`write_guard`) and is stopped at its next heartbeat (`interrupt`).
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict
from pathlib import Path

from capfilt.errors import LockLostError, RunError
from capfilt.runs.locking import interrupt
from capfilt.runs.locking.heartbeat import Heartbeat, create_exclusively
from capfilt.runs.locking.lock_file import (
    HEARTBEAT_SECONDS,
    LOCK_FILES,
    STALE_SECONDS,
    LockFile,
    Owner,
    find_lock,
    held_tokens,
    list_names,
    lock_folder,
    parse_owner,
)
from capfilt.storage import write_guard
from capfilt.storage.paths import StoragePath

_ATTEMPTS = 20  # rounds of a race for one lock; in each round one driver gets it


class Lock:
    """A lock that this process holds, and the thread that keeps it."""

    def __init__(self, folder: StoragePath, lock: LockFile, heartbeat: Heartbeat, interval: float):
        """`interval`: seconds between two heartbeats."""
        self.folder, self.path, self.number = folder, lock.path, lock.number
        self.lost_reason = ""
        """Why this process does not hold the lock any more; "" while it does."""
        assert lock.owner is not None, "we wrote it"
        self._owner = lock.owner
        held_tokens.add(self._owner.token)
        self._heartbeat = heartbeat
        successor, (home, path) = f"lock-{lock.number + 1}.json", (folder.absolute(), lock.path.absolute())
        self._guard = write_guard.WriteGuard(home, path, path.with_name(successor), lock.data)
        write_guard.activate([self._guard])
        interrupt.install_handler()
        self._pid = os.getpid()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep, args=(interval,), name="capfilt-lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Release the lock; one that was taken over belongs to its new owner and stays."""
        if self._released.is_set() or self._pid != os.getpid():  # a forked child does not hold it
            return
        self._released.set()
        self._thread.join()
        write_guard.deactivate(self._guard)
        held_tokens.discard(self._owner.token)
        try:
            if not self.lost_reason and not self._why_lost():
                self.path.unlink(missing_ok=True)
            self._heartbeat.stop()
        except OSError as error:  # a store that does not answer; the lock then counts as a dead owner's
            logging.getLogger(__name__).warning("%s could not be removed (%s); it does no harm", self.path, error)

    def _keep(self, interval: float) -> None:
        count = 0
        while not self._released.wait(interval):
            count += 1
            try:
                self._heartbeat.write(count)
                if isinstance(self.folder, Path) and not self.folder.is_dir():
                    return  # the whole run was deleted
                self.lost_reason = self._why_lost()
            except OSError:  # the file system does not answer; its state when it is back decides
                continue
            if self.lost_reason:
                return interrupt.interrupt_main_thread(self.lost_reason, self._released)

    def _why_lost(self) -> str:
        newest = find_lock(self.folder)
        if newest is None:
            return f"{self.path} was removed while the run was working"
        if newest.owner != self._owner:
            return (
                f"{self.folder} was taken over by {newest}, which had not seen this process for {STALE_SECONDS:.0f} s"
            )
        return ""


def acquire(folder: StoragePath, interval: float = HEARTBEAT_SECONDS, stale_after: float = STALE_SECONDS) -> Lock:
    """Become the one driver of an existing folder, with a heartbeat every `interval` seconds.

    Where a driver elsewhere holds the lock, it takes a few heartbeats to see that it lives, and `stale_after` seconds
    to see that it does not. A dead driver of this machine is replaced at once.

    Raises:
        RunError: another driver holds the lock; the message names it.
    """
    for _ in range(_ATTEMPTS):
        old = find_lock(folder)
        if old and old.is_alive(stale_after):
            raise RunError(
                f"{folder} is in use by {old}: two drivers would do all work twice. Wait for it, end it, or choose"
                " another --out."
            )
        if (lock := _create(folder, old, interval)) is not None:
            return lock
    raise RunError(f"{folder}: too many drivers want this run folder at once; start one of them.")


def _create(folder: StoragePath, old: LockFile | None, interval: float) -> Lock | None:
    """Create the next lock file; None where another process was faster."""
    number, home = (old.number + 1 if old else 1), lock_folder(folder)
    owner = Owner.this_process()
    lock = LockFile(home / f"lock-{number}.json", number, f"{json.dumps(asdict(owner))}\n".encode(), owner)
    if (heartbeat := create_exclusively(lock)) is None:
        return None
    newest = find_lock(folder)
    if newest is None or newest.owner != owner or (old is not None and _was_replaced(old)):
        # Between our check and our file another driver came and left, and a third began with a lower or higher number.
        lock.path.unlink(missing_ok=True)
        heartbeat.stop()
        return None
    for name in list_names(home):
        if (match := LOCK_FILES.match(name)) and int(match[1]) < number:
            (home / name).unlink(missing_ok=True)
    return Lock(folder, lock, heartbeat, interval)


def _was_replaced(old: LockFile) -> bool:
    """Whether the path of a dead owner's lock now holds the lock of another one."""
    with suppress(FileNotFoundError):
        return parse_owner(old.path.read_bytes()) != old.owner
    return False


_held: ContextVar[dict[StoragePath, Lock]] = ContextVar("_held", default={})  # noqa: B039 (one for the process is meant)
"""The locks of the current block of `driving`, outside of any those of this process."""


def acquire_once(folder: StoragePath) -> Lock:
    """Hold the lock of a run folder to the end of `driving`, or until `release_all`; a second call returns the same."""
    held, path = _held.get(), folder.resolve()
    lock = held.get(path)
    if lock is None or lock.lost_reason or not lock.path.is_file():
        if lock is not None:
            lock.release()
        held[path] = lock = acquire(path)
    return lock


def release_all() -> None:
    """Release every lock of this block of `driving`, or of this process."""
    held = _held.get()
    while held:
        held.popitem()[1].release()


@contextmanager
def driving() -> Iterator[None]:
    """Release, at the end of the block, the locks that were acquired in it, and no others.

    Raises:
        LockLostError: the block was interrupted because another driver took one of its run folders over.
    """
    before = _held.set({})
    try:
        yield
    except KeyboardInterrupt:
        if why := next((lock.lost_reason for lock in _held.get().values() if lock.lost_reason), ""):
            raise LockLostError(f"{why}; this command stops, what it committed stays") from None
        raise
    finally:
        release_all()
        _held.reset(before)


atexit.register(release_all)
