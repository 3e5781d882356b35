"""Logs, line by line: appended to a local file; on a store, where objects cannot grow, written again as a whole."""

from __future__ import annotations

import logging
import math
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from capfilt.storage import safe_paths, write_guard
from capfilt.storage.remote_path import RemotePath


def append_line(path: Path | RemotePath, line: bytes) -> None:
    """Add a line to a log. A local one is opened for appending and written once: processes do not mix their lines."""
    write_guard.check_lock(path)
    if isinstance(path, RemotePath):
        path.append(line)
        return
    file = safe_paths.open_log(path, safe_paths.PRIVATE)
    try:
        while line:  # a disk that is nearly full takes a part of it, and then raises
            line = line[os.write(file, line) :]
    finally:
        os.close(file)


class RemoteLog:
    """A log on a store that only this process writes, a context manager.

    The object is written with all its lines, in a thread, at most every `PAUSE` seconds, and once more when the block
    ends. A write that fails loses nothing, since the next one has all lines; only the last may raise OSError.
    """

    PAUSE = 10.0

    def __init__(self, path: RemotePath, lines: bytes = b""):
        """`lines`: what the object holds already."""
        self._path, self._lines = path, lines
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="log")
        self._writing: Future[None] | None = None
        self._written = -math.inf
        self._changed = False

    def add(self, line: bytes) -> None:
        """Add a line."""
        self._lines += line
        self._changed = True
        if (self._writing is None or self._writing.done()) and time.monotonic() - self._written >= self.PAUSE:
            self._written = time.monotonic()
            self._writing = self._pool.submit(self._try, self._lines)

    def __enter__(self) -> RemoteLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown()
        if kind is not None:
            self._try(self._lines)
        elif self._changed:
            self._write(self._lines)

    def _write(self, lines: bytes) -> None:
        write_guard.check_lock(self._path)
        self._path.write_bytes(lines)

    def _try(self, lines: bytes) -> None:
        try:
            self._write(lines)
        except OSError as error:
            logging.getLogger(__name__).warning("%s: the newest lines of this log are not there yet", error)
