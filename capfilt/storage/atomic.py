"""Atomic writes: a file appears whole or not at all, whatever kills its writer."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from capfilt.errors import RunError
from capfilt.storage import safe_paths, write_guard
from capfilt.storage.paths import RemotePath, StoragePath

PART = ".capfilt-part-"
"""How the name of every temporary file begins; a folder with only such files counts as empty."""


_PART = re.compile(rf"{re.escape(PART)}(?P<host>.+)-(?P<pid>[1-9]\d{{0,9}})-\w+")


_ABANDONED = 24 * 3600  # seconds after which another host's temporary file is taken for a dead one's


@contextmanager
def atomic(path: StoragePath, private: bool = False) -> Iterator[BinaryIO]:
    """Open a file that appears at `path` whole or not at all, whatever kills the process; two fsyncs.

    The bytes go to a temporary file beside `path`, one a writer, so two workers on one shard cannot mix theirs. Leave
    the file open: when the block ends it is flushed, synced, renamed and its folder synced, or removed if the block
    raises. On a store it becomes an object (`RemotePath.replaced`). `private`: only its owner may read it. Raises
    LockLostError, and replaces nothing, in a run folder that another driver took over.
    """
    if isinstance(path, RemotePath):
        with path.replaced() as file:
            yield file
            write_guard.confirm(path)
        return
    with safe_paths.opened_folder(path.parent, make=True) as folder:
        part = _part()
        try:
            with safe_paths.open_part(folder, path.parent / part, safe_paths.PRIVATE if private else 0o666) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            write_guard.confirm(path)
            os.replace(part, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(part, dir_fd=folder)
            raise
        os.fsync(folder)


def _part() -> str:
    """The name of a temporary file: of whom it is and, for one writer, of its own."""
    return f"{PART}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def link_or_copy(source: StoragePath, target: StoragePath) -> None:
    """Make `target` the same file as `source` by a link, or where links do not reach a copy with its times.

    No file of a run is ever written in place, so the two cannot change each other. A file of another user is copied:
    its owner could write into it later. What goes to a store or comes from one is copied, in one store by the store.
    """
    write_guard.confirm(target)
    if isinstance(source, RemotePath) and isinstance(target, RemotePath):
        target.copy_from(source)
        return
    if isinstance(source, RemotePath) or isinstance(target, RemotePath):
        with source.open("rb") as read, atomic(target) as file:
            shutil.copyfileobj(read, file)
        return
    with safe_paths.open_file(source) as read:
        known = os.fstat(read.fileno())
        if known.st_uid == os.geteuid() and _linked(source, target, known):
            return
        with atomic(target) as file:
            shutil.copyfileobj(read, file)
            file.flush()
            os.utime(file.fileno(), ns=(known.st_atime_ns, known.st_mtime_ns))


def _linked(source: Path, target: Path, known: os.stat_result) -> bool:
    """Whether `target` could be made another name of the file `source`, which is the one that is `known`."""
    with (
        safe_paths.opened_folder(source.parent) as there,
        safe_paths.opened_folder(target.parent, make=True) as folder,
    ):
        part = _part()
        try:
            os.link(source.name, part, src_dir_fd=there, dst_dir_fd=folder, follow_symlinks=False)
        except OSError:
            return False
        try:
            same = os.path.samestat(os.lstat(part, dir_fd=folder), known)
            if same:
                os.replace(part, target.name, src_dir_fd=folder, dst_dir_fd=folder)
            return same
        finally:
            with suppress(FileNotFoundError):  # a link that replaces itself leaves both names
                os.unlink(part, dir_fd=folder)


@contextmanager
def staging_folder(folder: StoragePath) -> Iterator[Path]:
    """A folder of this machine for what writes into paths only: `folder` itself, or for one on a store an empty one,
    whose files are sent there when the block ends, and never where it raises.
    """
    if isinstance(folder, Path):
        safe_paths.make_folder(folder)
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)
        for path in sorted(Path(scratch).iterdir()):
            link_or_copy(path, folder / path.name)


def sweep(folder: StoragePath, over: bool = False) -> int:
    """Remove what killed writers left under `folder` and return how many files that were.

    A file of this host goes when its process is gone, one of another host when it is a day old; at once where the
    work is `over`: then a writer that is cut off may live there still, but nobody waits for what it writes. Through a
    link nothing is looked for, and a name that no writer of ours gives stays.
    """
    if isinstance(folder, RemotePath):
        return folder.sweep()
    here, num_removed = socket.gethostname(), 0
    with safe_paths.opened_folder(folder) as top:
        for _, _, names, handle in os.fwalk(".", dir_fd=top):
            for found in filter(None, map(_PART.fullmatch, (name for name in names if name.startswith(PART)))):
                if not _alive(int(found["pid"])) if found["host"] == here else over or _old(found[0], handle):
                    with suppress(FileNotFoundError):
                        os.unlink(found[0], dir_fd=handle)
                    num_removed += 1
    return num_removed


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # signal 0 asks and does nothing
    except (ProcessLookupError, OverflowError):  # no machine has numbers as large as the second
        return False
    except PermissionError:  # somebody else's process
        return True
    return True


def _old(part: str, folder: int) -> bool:
    try:
        return time.time() - os.lstat(part, dir_fd=folder).st_mtime > _ABANDONED
    except FileNotFoundError:  # its writer has just renamed it
        return False


def write_json(path: StoragePath, obj: Any, private: bool = False) -> None:
    """Write `obj` atomically, keys sorted, indent 1; RunError for NaN and infinity, which JSON lacks."""
    try:
        text = json.dumps(obj, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise RunError(f"{path} would hold a figure that is no number ({error}); leave such figures out.") from error
    with atomic(path, private) as file:
        file.write(text.encode() + b"\n")


def sha256_file(path: StoragePath) -> str:
    """Return the sha256 of a file's bytes, read in pieces. RunError for a device, which would never end."""
    with safe_paths.open_file(path, follow=True) if isinstance(path, Path) else path.open() as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
