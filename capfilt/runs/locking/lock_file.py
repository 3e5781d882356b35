"""Lock files of run folders: their names, the owner that each one names, and whether that owner is alive.

A process of this machine is looked up in the kernel. For one elsewhere the heartbeat is watched: no two clocks are
compared, so a clock that is wrong or moved back decides nothing.
"""

from __future__ import annotations

import os
import re
import socket
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from capfilt.storage import documents
from capfilt.storage.paths import StoragePath
from capfilt.storage.remote_path import RemotePath

HEARTBEAT_SECONDS = 5.0
"""Seconds between two heartbeats."""
STALE_SECONDS = 60.0
"""Seconds of watching without a heartbeat after which an owner elsewhere counts as dead."""

LOCK_NAME = re.compile(r"lock-(\d+)\.json")
LOCK_FILES = re.compile(r"lock-(\d+)(\.json|-\w+\.beat)")
"""Names of locks and of their heartbeats; the number comes first in both."""
LOCK_FOLDER = "lock"
"""Where a run on a store has its locks: listing them must not mean listing the whole run."""

JOB_VARIABLE = "CAPFILT_JOB"
"""The environment variable that tells a command which job of a cluster it is."""

held_tokens: set[str] = set()
"""Tokens of the locks that this process holds. A lock file of this process with another token is of an attempt that was
cut short."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lock; the names of its fields are keys of the lock file."""

    token: str
    """Unique for each lock."""
    host: str
    pid: int
    machine: str
    """One boot of one kernel and its namespace of process ids; "" where that cannot be read."""
    born: str
    """When the process started, in ticks of the kernel: tells it from a later process of the same id."""
    job: str = ""
    """The job of a cluster that the process is, where it is one: `capfilt jobs` lists it."""

    @classmethod
    def this_process(cls) -> Owner:
        """This process, with a new token."""
        job = os.environ.get(JOB_VARIABLE, "")
        return cls(uuid.uuid4().hex, socket.gethostname(), os.getpid(), machine(), _start_time(os.getpid()), job)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f", job {self.job}" if self.job else "")

    def is_alive(self) -> bool | None:
        """Whether the process exists; None where that cannot be seen from here."""
        if not self.machine or self.machine != machine():
            return None
        if self.pid == os.getpid():
            return self.token in held_tokens
        return bool(self.born) and _start_time(self.pid) == self.born


def machine() -> str:
    """One boot of one kernel and one namespace of process ids: containers share the first and not the second."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux: the heartbeat alone decides
        return ""


def _start_time(pid: int) -> str:
    """When a process started, in ticks of the kernel; "" for one that has ended, a zombie too."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = state.rpartition(")")[2].split()  # the command's name before it may hold anything, ")" too
    return "" if fields[0] in "ZX" else fields[19]


@dataclass(frozen=True)
class LockFile:
    """A lock file as it was read."""

    path: StoragePath
    number: int
    data: bytes
    owner: Owner | None
    """None where the file is torn, or is just being written on a disk without hard links."""

    def __str__(self) -> str:
        return str(self.owner) if self.owner else f"an owner that {self.path} does not name"

    @property
    def heartbeat_path(self) -> RemotePath | None:
        """The object of the heartbeat, for a lock on a store."""
        if not isinstance(self.path, RemotePath) or self.owner is None:
            return None
        return self.path.with_name(f"{self.path.stem}-{self.owner.token}.beat")

    def read_heartbeat(self) -> bytes:
        """What changes while the owner lives. FileNotFoundError where the lock is gone."""
        if self.heartbeat_path is None:
            return self.path.read_bytes()
        if not self.path.is_file():
            raise FileNotFoundError(self.path)
        return self.heartbeat_path.read_bytes() if self.heartbeat_path.is_file() else b""  # before the first one

    def is_alive(self, patience: float) -> bool:
        """Whether the owner lives: by the kernel where it can tell, else by watching for `patience` seconds."""
        if self.owner and (alive := self.owner.is_alive()) is not None:
            return alive
        pause = min(0.25 if self.heartbeat_path is None else 1.0, patience / 10)
        end = time.monotonic() + patience
        with suppress(FileNotFoundError):  # released while we watched
            before = self.data if self.heartbeat_path is None else self.read_heartbeat()
            while time.monotonic() < end:
                time.sleep(pause)
                if self.read_heartbeat() != before:
                    return True
        return False


def find_lock(folder: StoragePath) -> LockFile | None:
    """The newest lock of a run folder, whether its owner lives or not; None where there is none."""
    home = lock_folder(folder)
    numbered = [(int(match[1]), name) for name in list_names(home) if (match := LOCK_NAME.fullmatch(name))]
    while numbered:
        number, name = max(numbered)
        try:
            data = documents.read_bytes(home / name, 2**16)
        except FileNotFoundError:  # released this moment
            numbered.remove((number, name))
            continue
        return LockFile(home / name, number, data, parse_owner(data))
    return None


def driver_of(folder: StoragePath, patience: float = 2 * HEARTBEAT_SECONDS) -> str:
    """Who drives the run now, for people; "" for nobody. `patience`: seconds to watch an owner elsewhere."""
    lock = find_lock(folder)
    return f"{lock}" if lock and lock.is_alive(patience) else ""


def lock_folder(folder: StoragePath) -> StoragePath:
    """Where the locks of a run folder are: in itself, or in a folder of their own on a store."""
    return folder / LOCK_FOLDER if isinstance(folder, RemotePath) else folder


def list_names(home: StoragePath) -> list[str]:
    """The names in a folder; [] where there is none."""
    if isinstance(home, RemotePath):
        return list(home.listing())
    with suppress(FileNotFoundError):
        return os.listdir(home)
    return []


def parse_owner(data: bytes) -> Owner | None:
    """The owner that a lock file names; None where it is torn."""
    try:
        tree = documents.parse(data.split(b"\n")[0])
        job = str(tree.get("job", ""))
        return Owner(**{name: type_(tree[name]) for name, type_ in _FIELDS.items()}, job=job)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None


_FIELDS = {"token": str, "host": str, "pid": int, "machine": str, "born": str}
