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
from capfilt.storage.paths import StoragePath
from capfilt.storage.remote_path import RemotePath

PART = ".capfilt-part-"
"""How the name of every temporary file begins; a folder with only such files counts as empty."""
_PART = re.compile(rf"{re.escape(PART)}(?P<host>.+)-(?P<pid>[1-9]\d{{0,9}})-\w+")
_ABANDONED = 24 * 3600  # seconds after which a temporary file of another host counts as left behind


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
            write_guard.check_lock(path)
        return
    with safe_paths.opened_folder(path.parent, make=True) as folder:
        part = _part()
        try:
            with safe_paths.create_file(folder, path.parent / part, safe_paths.PRIVATE if private else 0o666) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            write_guard.check_lock(path)
            os.replace(part, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(part, dir_fd=folder)
            raise
        os.fsync(folder)


def _part() -> str:
    """A new name of a temporary file, with the host and process that write it."""
    return f"{PART}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def link_or_copy(source: StoragePath, target: StoragePath) -> None:
    """Make `target` a hard link of `source`, or a copy with its times where a link cannot be made.

    No file of a run is ever written in place, so neither can change the other. A file of another user is copied: its
    owner could write into it later. To and from a store it is a copy, within one store made by the store itself.
    """
    write_guard.check_lock(target)
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
    """Try to make `target` a hard link of `source`, if that is still the file with the stat `known`."""
    with (
        safe_paths.opened_folder(source.parent) as source_folder,
        safe_paths.opened_folder(target.parent, make=True) as folder,
    ):
        part = _part()
        try:
            os.link(source.name, part, src_dir_fd=source_folder, dst_dir_fd=folder, follow_symlinks=False)
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
    """A local folder for code that writes to paths only: `folder` itself, or a temporary one for a folder on a store.

    The files of a temporary one are sent to the store when the block ends, and not where it raises.
    """
    if isinstance(folder, Path):
        safe_paths.make_folder(folder)
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)
        for path in sorted(Path(scratch).iterdir()):
            link_or_copy(path, folder / path.name)


def sweep(folder: StoragePath, finished: bool = False) -> int:
    """Remove the temporary files that killed writers left under `folder`; returns how many.

    A file of this host is removed when its process is gone, one of another host when it is a day old, or at once where
    the work is `finished`: a writer that lost its driver may still live there, but nothing needs what it writes. No
    link is followed, and only names that `atomic` gives are touched.
    """
    if isinstance(folder, RemotePath):
        return folder.sweep()
    here, num_removed = socket.gethostname(), 0
    with safe_paths.opened_folder(folder) as top:
        for _, _, names, handle in os.fwalk(".", dir_fd=top):
            for part in filter(None, map(_PART.fullmatch, (name for name in names if name.startswith(PART)))):
                if not _alive(int(part["pid"])) if part["host"] == here else finished or _old(part[0], handle):
                    with suppress(FileNotFoundError):
                        os.unlink(part[0], dir_fd=handle)
                    num_removed += 1
    return num_removed


def _alive(pid: int) -> bool:
    try:
        with suppress(PermissionError):  # a process of another user
            os.kill(pid, 0)  # signal 0 checks the process and does nothing
    except (ProcessLookupError, OverflowError):  # OverflowError: no machine has such large process ids
        return False
    return True


def _old(part: str, folder: int) -> bool:
    try:
        return time.time() - os.lstat(part, dir_fd=folder).st_mtime > _ABANDONED
    except FileNotFoundError:  # its writer has just renamed it
        return False


def write_json(path: StoragePath, obj: Any, private: bool = False) -> None:
    """Write `obj` atomically, keys sorted, indent 1. RunError for NaN and infinity, which JSON lacks."""
    try:
        text = json.dumps(obj, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise RunError(
            f"{path} would hold NaN or infinity, which JSON lacks ({error}); leave such figures out."
        ) from error
    with atomic(path, private) as file:
        file.write(text.encode() + b"\n")


def sha256_file(path: StoragePath) -> str:
    """Return the sha256 of a file's bytes, which are not all held in memory. RunError for a device."""
    with safe_paths.open_file(path, follow=True) if isinstance(path, Path) else path.open() as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
