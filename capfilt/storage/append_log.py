"""Logs: lines are added to a file; on a store, where a file cannot be added to, it is written anew."""

from __future__ import annotations

import logging
import math
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from capfilt.storage import safe_paths, write_guard
from capfilt.storage.paths import RemotePath


def append(where: Path | RemotePath, line: bytes) -> None:
    """Add a line to a log. Locally it is one write to a file opened for appending: lines of processes do not mix."""
    write_guard.confirm(where)
    if isinstance(where, RemotePath):
        where.append(line)
        return
    file = safe_paths.open_log(where, safe_paths.PRIVATE)
    try:
        while line:  # a disk that is nearly full takes a part of it, and then says so
            line = line[os.write(file, line) :]
    finally:
        os.close(file)


class Journal:
    """A log on a store that one process writes. An object cannot be added to: it is written anew with all its lines, in
    a thread, every `PAUSE` seconds at most, and with the last of them when the block ends.

    A write that fails loses nothing, since the next has all lines; only the last may raise.
    """

    PAUSE = 10.0

    def __init__(self, where: RemotePath, lines: bytes = b""):
        """`lines` lie there already."""
        self._where, self._lines = where, lines
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="journal")
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

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown()
        if kind is not None:
            self._try(self._lines)
        elif self._changed:
            self._write(self._lines)

    def _write(self, lines: bytes) -> None:
        write_guard.confirm(self._where)
        self._where.write_bytes(lines)

    def _try(self, lines: bytes) -> None:
        try:
            self._write(lines)
        except OSError as error:
            logging.getLogger(__name__).warning("%s: the newest lines of this log are not there yet", error)
