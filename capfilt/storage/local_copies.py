"""Local copies of files on stores, for libraries that read from paths alone: models and tokenizers.

A copy is made once a machine, in the folder `capfilt-UID` of the temporary files, and removed after a week without use.
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

from capfilt.storage.paths import storage_path
from capfilt.storage.remote_path import PART_BYTES, RemotePath

KEPT_DAYS = 7
"""Days without use after which a copy is removed."""

_THIS_PROCESS = uuid.uuid4().hex


def local_copy(source: str | Path | RemotePath) -> Path:
    """The local path of a file or folder: itself, or that of a copy if it is on a store.

    Of a folder on a store, the objects directly in it are copied. A copy is made once a machine and made again when the
    store reports another size, time or version of any object.

    Raises:
        OSError: there is no such object, or the store cannot be read.
    """
    source = storage_path(source)
    if isinstance(source, Path):
        return source
    stats = {source: source.stat()} if source.is_file() else {source / n: s for n, s in source.listing().items() if s}
    if not stats:
        raise FileNotFoundError(f"{source}: no object has this name or lies below it")
    identity = [source.url, *sorted((path.name, repr(stat)) for path, stat in stats.items())]
    if not all(stat.version or stat.st_mtime for stat in stats.values()):
        identity.append(_THIS_PROCESS)  # the store has neither times nor versions: copy once a process
    copy = _copies_folder() / hashlib.sha256(repr(identity).encode()).hexdigest()[:32]
    names = {path: source.name if path == source else f"{source.name}/{path.name}" for path in stats}
    with copy.with_suffix(".turn").open("w") as lock:  # all ranks of a node come here at about the same time
        fcntl.flock(lock, fcntl.LOCK_EX)
        sizes = {names[path]: stat.st_size for path, stat in stats.items()}
        if {name: (copy / name).stat().st_size for name in sizes if (copy / name).is_file()} != sizes:
            shutil.rmtree(copy, ignore_errors=True)
            _remove_old(copy.parent)
            for path, name in names.items():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                with path.open() as read, (copy / name).open("wb") as file:
                    shutil.copyfileobj(read, file, PART_BYTES)
    os.utime(copy)
    return copy / source.name


def _copies_folder() -> Path:
    """The folder of copies. PermissionError where another user owns a folder of that name, or may write into it."""
    home = Path(tempfile.gettempdir(), f"capfilt-{os.getuid()}")
    home.mkdir(mode=0o700, exist_ok=True)
    known = home.lstat()
    if not stat.S_ISDIR(known.st_mode) or known.st_uid != os.getuid():
        raise PermissionError(f"{home} belongs to another user; let TMPDIR name another folder.")
    if known.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"other users may write into {home}: remove it, or let TMPDIR name another folder.")
    return home


def _remove_old(copies: Path) -> None:
    for path in copies.iterdir():
        with suppress(FileNotFoundError):
            known = path.lstat()
            if stat.S_ISDIR(known.st_mode) and time.time() - known.st_mtime > KEPT_DAYS * 86400:
                shutil.rmtree(path, ignore_errors=True)
