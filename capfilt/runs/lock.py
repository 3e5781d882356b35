"""One driver a run folder: a lock file with its owner and a heartbeat, and how that of a dead owner is taken over.

It rests on creating a file that must not exist, which shared file systems do exactly, and not on flock, which they
forget. No two clocks are compared: whether an owner elsewhere lives is seen by watching its heartbeat, so a clock that
is wrong or moved back decides nothing. A lock is never overwritten: lock-2.json takes over from lock-1.json, and the
highest number is the lock.

On a store (in `lock/` of the run) creating is a conditional PUT; one that a store takes though the object is there is
found out by trying, and such a store refused. A heartbeat there is an object of its own, lock-1-TOKEN.beat, which
nobody else ever writes: were it the lock itself, written anew, then a driver that slept, was taken over, and wakes
when all is over could write over the lock-1.json of a third. So the number may be used again. What is left is the
moment between a driver's last look at its lock and its removing it: removed is then the lock of a third, who stops.
Whoever loses its lock writes nothing more (fence.py) and is stopped at its next heartbeat (interrupt.py).
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from capfilt.errors import LockLostError, RunError
from capfilt.runs import interrupt
from capfilt.storage import documents, write_guard
from capfilt.storage.atomic import PART
from capfilt.storage.paths import StoragePath
from capfilt.storage.remote_path import RemotePath

BEAT = 5.0
"""Seconds between two heartbeats."""
STALE = 60.0
"""Seconds of watching without a heartbeat after which an owner elsewhere is taken for dead."""
PATTERN = re.compile(r"lock-(\d+)\.json")
_OURS = re.compile(r"lock-(\d+)(\.json|-\w+\.beat)")
FOLDER = "lock"  # where the locks of a run on a store are: to list them must not be to list all of the run

_TRIES = 20  # rounds of a race for one lock; each round somebody wins

JOB = "CAPFILT_JOB"
"""The environment variable that tells a command which job of a cluster it is."""

_tokens: set[str] = set()  # of the locks that this process holds; another of its own is an attempt that was cut short


@dataclass(frozen=True)
class Owner:
    """Who holds a lock. `machine` names one boot of one kernel and its process numbers; `born` tells a process from
    a later one of the same number."""

    token: str
    host: str
    pid: int
    machine: str
    born: str
    job: str = ""
    """The job of a cluster that the process is, where it is one: `capfilt jobs` knows it."""

    @classmethod
    def me(cls) -> Owner:
        """This process."""
        job = os.environ.get(JOB, "")
        return cls(uuid.uuid4().hex, socket.gethostname(), os.getpid(), machine(), _born(os.getpid()), job)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f", job {self.job}" if self.job else "")

    def lives(self) -> bool | None:
        """Whether the process is there; None where it cannot be seen from here, or where machines have no names."""
        if not self.machine or self.machine != machine():
            return None
        if self.pid == os.getpid():
            return self.token in _tokens
        return bool(self.born) and _born(self.pid) == self.born


def machine() -> str:
    """One boot of one kernel, and the space of its process numbers: containers share the first, not the second."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux: the heartbeat alone decides
        return ""


def _born(pid: int) -> str:
    """When a process began, in the kernel's ticks; "" for one that is gone or only waits to be buried."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = state.rpartition(")")[2].split()  # the name before it may hold anything
    return "" if fields[0] in "ZX" else fields[19]


@dataclass(frozen=True)
class Found:
    """A lock file as it was read: `owner` is None where it is torn, or just being written on a disk without links."""

    path: StoragePath
    number: int
    data: bytes
    owner: Owner | None

    def __str__(self) -> str:
        return str(self.owner) if self.owner else f"an owner that {self.path} does not name"

    @property
    def beat(self) -> RemotePath | None:
        """The object of the heartbeat, where the lock is on a store."""
        if not isinstance(self.path, RemotePath) or self.owner is None:
            return None
        return self.path.with_name(f"{self.path.stem}-{self.owner.token}.beat")

    def pulse(self) -> bytes:
        """What changes while the owner lives. FileNotFoundError where the lock is gone."""
        if self.beat is None:
            return self.path.read_bytes()
        if not self.path.is_file():
            raise FileNotFoundError(self.path)
        return self.beat.read_bytes() if self.beat.is_file() else b""  # it has not beaten yet


def find(folder: StoragePath) -> Found | None:
    """The lock of a run folder, its owner alive or dead; None where there is none."""
    home = _home(folder)
    numbered = [(int(match[1]), name) for name in _names(home) if (match := PATTERN.fullmatch(name))]
    while numbered:
        number, name = max(numbered)
        try:
            data = documents.read_bytes(home / name, 2**16)
        except FileNotFoundError:  # let go this moment
            numbered.remove((number, name))
            continue
        return Found(home / name, number, data, _owner(data))
    return None


def state(folder: StoragePath, patience: float = 2 * BEAT) -> str:
    """Who drives the run now, for people; "" for nobody. `patience`: seconds to watch an owner elsewhere."""
    found = find(folder)
    return f"{found}" if found and _beats(found, patience) else ""


def _home(folder: StoragePath) -> StoragePath:
    return folder / FOLDER if isinstance(folder, RemotePath) else folder


def _names(home: StoragePath) -> list[str]:
    if isinstance(home, RemotePath):
        return list(home.listing())
    with suppress(FileNotFoundError):
        return os.listdir(home)
    return []


def _owner(data: bytes) -> Owner | None:
    try:
        found = documents.parse(data.split(b"\n")[0])
        job = str(found.get("job", ""))
        return Owner(**{name: type_(found[name]) for name, type_ in _FIELDS.items()}, job=job)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None


_FIELDS = {"token": str, "host": str, "pid": int, "machine": str, "born": str}


def _beats(found: Found, patience: float) -> bool:
    """Whether the lock's owner lives: asked of the kernel where it can tell, else watched for `patience` seconds."""
    if found.owner and (lives := found.owner.lives()) is not None:
        return lives
    look, end = min(0.25 if found.beat is None else 1.0, patience / 10), time.monotonic() + patience
    with suppress(FileNotFoundError):  # let go while we watched
        before = found.data if found.beat is None else found.pulse()
        while time.monotonic() < end:
            time.sleep(look)
            if found.pulse() != before:
                return True
    return False


class Heart(Protocol):
    """What a lock is kept alive by."""

    def beat(self, count: int) -> None: ...
    def stop(self) -> None: ...


class FileHeart:
    """The second line of the lock's own file, by its descriptor: this can never overwrite the lock of somebody else."""

    def __init__(self, file: int, head: int):
        self._file, self._head = file, head

    def beat(self, count: int) -> None:
        """Write another number."""
        os.pwrite(self._file, b"%016d\n" % count, self._head)
        os.fsync(self._file)

    def stop(self) -> None:
        """Let go of the file."""
        os.close(self._file)


class ObjectHeart:
    """An object beside the lock, with a name that nobody else ever writes."""

    def __init__(self, place: RemotePath):
        self._place = place

    def beat(self, count: int) -> None:
        """Write another number."""
        self._place.write_bytes(b"%016d\n" % count)

    def stop(self) -> None:
        """Remove it."""
        self._place.unlink(missing_ok=True)


class Lock:
    """A lock that this process holds, and the thread that keeps it."""

    def __init__(self, folder: StoragePath, found: Found, heart: Heart, beat: float):
        self.folder, self.path, self.number = folder, found.path, found.number
        self.lost = ""
        """Why the lock is not ours any more; "" while it is."""
        assert found.owner is not None, "we wrote it"
        self._owner = found.owner
        _tokens.add(self._owner.token)
        self._heart = heart
        after, (home, path) = f"lock-{found.number + 1}.json", (folder.absolute(), found.path.absolute())
        self._fence = write_guard.WriteGuard(home, path, path.with_name(after), found.data)
        write_guard.activate([self._fence])
        interrupt.arm()
        self._pid = os.getpid()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, args=(beat,), name="capfilt-lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Let go; a lock that was taken over is its new owner's."""
        if self._over.is_set() or self._pid != os.getpid():  # a forked child holds nothing
            return
        self._over.set()
        self._thread.join()
        write_guard.deactivate(self._fence)
        _tokens.discard(self._owner.token)
        try:
            if not self.lost and not self._taken():
                self.path.unlink(missing_ok=True)
            self._heart.stop()
        except OSError as error:  # a store that does not answer; the lock is then taken for a dead one's
            logging.getLogger(__name__).warning("%s stays behind (%s); it does no harm", self.path, error)

    def _keep(self, beat: float) -> None:
        count = 0
        while not self._over.wait(beat):
            count += 1
            try:
                self._heart.beat(count)
                if isinstance(self.folder, Path) and not self.folder.is_dir():
                    return  # the whole run was deleted: there is nothing left to keep
                self.lost = self._taken()
            except OSError:  # the file system does not answer; what it says when it is back decides
                continue
            if self.lost:
                return interrupt.stop(self.lost, self._over)

    def _taken(self) -> str:
        found = find(self.folder)
        if found is None:
            return f"{self.path} was removed while the run was working"
        if found.owner != self._owner:
            return f"{self.folder} was taken over by {found}, which had not seen this process for {STALE:.0f} s"
        return ""


def acquire(folder: StoragePath, beat: float = BEAT, stale: float = STALE) -> Lock:
    """Become the one driver of an existing folder.

    Raises RunError, naming the owner, where another driver lives; that may take a few heartbeats to see, and a dead
    one elsewhere takes `stale` seconds to be given up. One that died on this machine is replaced at once.
    """
    for _ in range(_TRIES):
        old = find(folder)
        if old and _beats(old, stale):
            raise RunError(
                f"{folder} is in use by {old}: two drivers would do all work twice. Wait for it, end it, or choose"
                " another --out."
            )
        if (lock := _create(folder, old, beat)) is not None:
            return lock
    raise RunError(f"{folder}: too many drivers want this run folder at once; start one of them.")


def _create(folder: StoragePath, old: Found | None, beat: float) -> Lock | None:
    """Make the next lock file; None where somebody else was faster."""
    number, home = (old.number + 1 if old else 1), _home(folder)
    owner = Owner.me()
    found = Found(home / f"lock-{number}.json", number, f"{json.dumps(asdict(owner))}\n".encode(), owner)
    if (heart := _exclusive(found)) is None:
        return None
    newest = find(folder)
    if newest is None or newest.owner != owner or (old is not None and _reused(old)):
        # Between our look and our file another driver came and went, and a third began anew below us, or above.
        found.path.unlink(missing_ok=True)
        heart.stop()
        return None
    for name in _names(home):
        if (match := _OURS.match(name)) and int(match[1]) < number:
            (home / name).unlink(missing_ok=True)
    return Lock(folder, found, heart, beat)


def _reused(old: Found) -> bool:
    """Whether somebody else's lock lies where a dead one was judged."""
    with suppress(FileNotFoundError):
        return _owner(old.path.read_bytes()) != old.owner
    return False


def _exclusive(found: Found) -> Heart | None:
    """Create a lock with all its bytes; None where there is one of that name."""
    if isinstance(found.path, RemotePath):
        return _exclusive_object(found.path, found)
    part = found.path.with_name(f"{PART}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    file = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.write(file, found.data + b"%016d\n" % 0)
        os.fsync(file)
        try:
            os.link(part, found.path)
        except FileExistsError:
            if os.stat(part).st_nlink != 2:  # else it is ours: the server's first answer was lost, not its work
                os.close(file)
                return None
        except OSError:  # a file system without links
            os.close(file)
            return _exclusive_plain(found.path, found.data)
        return FileHeart(file, len(found.data))
    finally:
        os.unlink(part)


def _exclusive_plain(path: Path, data: bytes) -> Heart | None:
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return None
    os.write(file, data + b"%016d\n" % 0)
    os.fsync(file)
    return FileHeart(file, len(data))


def _exclusive_object(path: RemotePath, found: Found) -> Heart | None:
    if not path.create(found.data):
        return None
    if path.create(b"may this be written over?"):
        path.unlink()
        raise RunError(
            f"{path.parent.parent}: this store writes over an object that must not be there, so it cannot keep two"
            " drivers apart; give an --out on a disk, or on a store with conditional writes (S3, GCS, Azure)."
        )
    assert found.beat is not None, "it is on a store and has an owner"
    return ObjectHeart(found.beat)


_held: ContextVar[dict[StoragePath, Lock]] = ContextVar("_held", default={})  # noqa: B039 (one for the process is meant)
"""The locks of whoever is at work: of a block of `driving`, else of this process."""


def hold(folder: StoragePath) -> Lock:
    """Hold the lock of a run folder to the end of `driving`, or until `release_all`; a second call gives the same."""
    held, where = _held.get(), folder.resolve()
    lock = held.get(where)
    if lock is None or lock.lost or not lock.path.is_file():
        if lock is not None:
            lock.release()
        held[where] = lock = acquire(where)
    return lock


def release_all() -> None:
    """Let go of every lock of this block of `driving`, or of this process."""
    held = _held.get()
    while held:
        held.popitem()[1].release()


@contextmanager
def driving() -> Iterator[None]:
    """Let go, at the end of the block, of the locks that were taken in it, and of no other's.

    Raises:
        LockLostError: the block was interrupted because another driver took one of its run folders over.
    """
    before = _held.set({})
    try:
        yield
    except KeyboardInterrupt:
        if why := next((lock.lost for lock in _held.get().values() if lock.lost), ""):
            raise LockLostError(f"{why}; this command stops, what it committed stays") from None
        raise
    finally:
        release_all()
        _held.reset(before)


atexit.register(release_all)
