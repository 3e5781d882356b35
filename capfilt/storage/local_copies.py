"""Copies of what lies on stores, for those who can read from a path alone: models and tokenizers.

A copy is made once a machine, in `capfilt-UID` with the temporary files, and goes when nobody asked for it for a week.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import time
import uuid
from contextlib import suppress
from pathlib import Path

from capfilt.storage.paths import PART_BYTES, RemotePath, storage_path

KEPT_DAYS = 7
"""Days after which a copy that nobody asked for goes."""

_THIS_PROCESS = uuid.uuid4().hex


def local_copy(where: str | Path | RemotePath) -> Path:
    """What lies at a place as a path of this machine: its own, or that of a copy of what a store has there.

    Copied is an object, or the objects of a folder and none below; once a machine, for as long as the store tells the
    same of them. Copies lie in `capfilt-UID` with the temporary files, and go when nobody asked for them for a week.

    Raises:
        OSError: nothing lies there, or the store does not give it.
    """
    where = storage_path(where)
    if isinstance(where, Path):
        return where
    found = {where: where.stat()} if where.is_file() else {where / n: s for n, s in where.listing().items() if s}
    if not found:
        raise FileNotFoundError(f"{where}: nothing lies there")
    told = [where.url, *sorted((path.name, repr(stat)) for path, stat in found.items())]
    if not all(stat.version or stat.st_mtime for stat in found.values()):
        told.append(_THIS_PROCESS)  # the store does not say whether they changed
    home = _copies() / hashlib.sha256(repr(told).encode()).hexdigest()[:32]
    names = {path: where.name if path == where else f"{where.name}/{path.name}" for path in found}
    with home.with_suffix(".turn").open("w") as turn:  # a node's ranks all ask at once
        fcntl.flock(turn, fcntl.LOCK_EX)
        sizes = {names[path]: stat.st_size for path, stat in found.items()}
        if {name: (home / name).stat().st_size for name in sizes if (home / name).is_file()} != sizes:
            shutil.rmtree(home, ignore_errors=True)
            _forget_old(home.parent)
            for path, name in names.items():
                (home / name).parent.mkdir(parents=True, exist_ok=True)
                with path.open() as read, (home / name).open("wb") as file:
                    shutil.copyfileobj(read, file, PART_BYTES)
    os.utime(home)
    return home / where.name


def _copies() -> Path:
    """Where copies lie. PermissionError where somebody else has made a folder of that name, or may write into it."""
    home = Path(tempfile.gettempdir(), f"capfilt-{os.getuid()}")
    home.mkdir(mode=0o700, exist_ok=True)
    known = home.lstat()
    if not stat.S_ISDIR(known.st_mode) or known.st_uid != os.getuid():
        raise PermissionError(f"{home} belongs to somebody else; let TMPDIR name another folder.")
    if known.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"others may write into {home}: remove it, or let TMPDIR name another folder.")
    return home


def _forget_old(copies: Path) -> None:
    for path in copies.iterdir():
        with suppress(FileNotFoundError):
            known = path.lstat()
            if stat.S_ISDIR(known.st_mode) and time.time() - known.st_mtime > KEPT_DAYS * 86400:
                shutil.rmtree(path, ignore_errors=True)
