"""Creates a lock file that must not exist yet, and writes the heartbeat that keeps it alive.

On a disk the heartbeat is the second line of the lock file, written through the descriptor that created it. On a store
it is an object of its own, lock-1-TOKEN.beat, that nobody else ever writes: if it were the lock itself, written again,
a driver that was suspended, was taken over, and wakes when all is over could write over the lock-1.json of a third.
"""

from __future__ import annotations

import os
import socket
import uuid
from pathlib import Path
from typing import Protocol

from capfilt.errors import RunError
from capfilt.runs.locking.lock_file import LockFile
from capfilt.storage.atomic import PART
from capfilt.storage.remote_path import RemotePath


class Heartbeat(Protocol):
    """What shows that the owner of a lock lives."""

    def write(self, count: int) -> None: ...
    def stop(self) -> None: ...


class FileHeartbeat:
    """The second line of the lock file, written by its descriptor: that can never overwrite another driver's lock."""

    def __init__(self, file: int, offset: int):
        self._file, self._offset = file, offset

    def write(self, count: int) -> None:
        os.pwrite(self._file, b"%016d\n" % count, self._offset)
        os.fsync(self._file)

    def stop(self) -> None:
        os.close(self._file)


class ObjectHeartbeat:
    """An object beside the lock, under a name that nobody else ever writes."""

    def __init__(self, path: RemotePath):
        self._path = path

    def write(self, count: int) -> None:
        self._path.write_bytes(b"%016d\n" % count)

    def stop(self) -> None:
        self._path.unlink(missing_ok=True)


def create_exclusively(lock: LockFile) -> Heartbeat | None:
    """Create a lock file with all its bytes; None where there is one of that name."""
    if isinstance(lock.path, RemotePath):
        return _create_object(lock.path, lock)
    part = lock.path.with_name(f"{PART}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    file = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.write(file, lock.data + b"%016d\n" % 0)
        os.fsync(file)
        try:
            os.link(part, lock.path)
        except FileExistsError:
            if os.stat(part).st_nlink != 2:  # else the link is ours, and the file server's first answer was lost
                os.close(file)
                return None
        except OSError:  # a file system without hard links
            os.close(file)
            return _create_in_place(lock.path, lock.data)
        return FileHeartbeat(file, len(lock.data))
    finally:
        os.unlink(part)


def _create_in_place(path: Path, data: bytes) -> Heartbeat | None:
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return None
    os.write(file, data + b"%016d\n" % 0)
    os.fsync(file)
    return FileHeartbeat(file, len(data))


def _create_object(path: RemotePath, lock: LockFile) -> Heartbeat | None:
    if not path.create(lock.data):
        return None
    if path.create(b"may this be written over?"):  # some stores ignore the condition: try, and refuse such a store
        path.unlink()
        raise RunError(
            f"{path.parent.parent}: this store writes over an object that must not be there, so it cannot keep two"
            " drivers apart; give an --out on a disk, or on a store with conditional writes (S3, GCS, Azure)."
        )
    assert lock.heartbeat_path is not None, "it is on a store and has an owner"
    return ObjectHeartbeat(lock.heartbeat_path)
