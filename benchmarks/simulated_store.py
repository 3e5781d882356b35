"""The store and the clock of `simulation.py`: objects in memory whose answers take simulated time, and are counted."""

from __future__ import annotations

import io
import threading
from collections import Counter, defaultdict
from typing import Any, ClassVar

from fsspec import AbstractFileSystem

from capfilt.storage.paths import AT_ONCE

PER_SECOND = {"read": 5500, "write": 3500, "list": 3500}
"""Requests that a prefix answers."""


class Clock:
    """The simulated time, in seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self.busy = 0.0
        """Of the driver, waiting for the store."""


CLOCK, MAIN = Clock(), threading.main_thread()


class SlowStore(AbstractFileSystem):
    """Objects in memory, whose answers take simulated time."""

    protocol = "slow"
    cachable = True
    answer: ClassVar[float] = 0.05
    objects: ClassVar[dict[str, bytes]] = {}
    folders: ClassVar[dict[str, dict[str, None]]] = defaultdict(dict)
    counts: ClassVar[Counter[tuple[str, str]]] = Counter()
    """Requests by (who, kind)."""
    throttled: ClassVar[Counter[str]] = Counter()
    """Requests that waited for others of their prefix, by kind."""
    served: ClassVar[Counter[tuple[str, str, int]]] = Counter()
    """Requests by prefix, kind and second; what is over the limit of a second waits for one with room."""
    working: ClassVar[bool] = False
    """Whether the main thread plays a worker; all others are the driver's."""
    spent: ClassVar[float] = 0.0
    """Seconds that the worker of the moment has waited for the store."""
    turn: ClassVar[threading.Lock] = threading.Lock()

    def ask(self, kind: str, path: str, times: int = 1) -> None:
        """Count a request, and let its time pass."""
        cls, in_main = type(self), threading.current_thread() is MAIN
        worker = in_main and cls.working
        with cls.turn:
            cls.counts["worker" if worker else "driver", kind] += times
            prefix, now = (path.rpartition("/")[0], kind), CLOCK.now + (cls.spent if worker else 0.0)
            second = int(now)
            while cls.served[*prefix, second] >= PER_SECOND[kind]:
                second += 1
            cls.served[*prefix, second] += times
            cls.throttled[kind] += second > now
            seconds = times * cls.answer + max(0.0, second - now)
            if worker:
                cls.spent += seconds
            else:
                share = seconds if in_main else seconds / AT_ONCE
                CLOCK.now, CLOCK.busy = CLOCK.now + share, CLOCK.busy + share

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        self.ask("read", path)
        if path in self.objects:
            return self._entry(path)
        if path in self.folders:
            return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def _entry(self, path: str) -> dict[str, Any]:
        return {"name": path, "size": len(self.objects[path]), "type": "file", "ETag": "e", "LastModified": 1.0}

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        path = self._strip_protocol(path)
        names = self.folders.get(path)
        self.ask("list", path, 1 + len(names or ()) // 1000)
        if names is None:
            raise FileNotFoundError(path)
        full = [f"{path}/{name}" for name in list(names)]
        return [
            self._entry(name) if name in self.objects else {"name": name, "size": 0, "type": "directory"}
            for name in full
        ]

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        path = self._strip_protocol(path)
        self.ask("read", path)
        if path not in self.objects:
            raise FileNotFoundError(path)
        return self.objects[path][start:end]

    _fetch = cat_file

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        return io.BytesIO(self.cat_file(path))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        path = self._strip_protocol(path)
        self.ask("write", path)
        if mode == "create" and path in self.objects:
            raise FileExistsError(path)
        self.objects[path] = bytes(value)
        while "/" in path:
            folder, _, name = path.rpartition("/")
            known = name in self.folders[folder]
            self.folders[folder][name] = None
            if known:
                return
            path = folder

    def rm_file(self, path: str) -> None:
        path = self._strip_protocol(path)
        self.ask("write", path)
        if self.objects.pop(path, None) is None:
            raise FileNotFoundError(path)
        folder, _, name = path.rpartition("/")
        self.folders[folder].pop(name, None)
