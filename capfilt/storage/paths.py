"""Where a run lies: a folder of this machine (pathlib.Path), or a folder on any store (RemotePath).

Functions here take either. Local paths go through `safe_paths`, which follows no link inside a run folder.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path, PurePath
from typing import Annotated, BinaryIO, TypeVar

import fsspec
from pydantic import PlainSerializer, PlainValidator

from capfilt.errors import UsageError
from capfilt.redact import HIDDEN, redact
from capfilt.storage import safe_paths
from capfilt.storage.remote_path import RemotePath, Stat

T = TypeVar("T")
R = TypeVar("R")

AT_ONCE = 32
"""Requests that one process has open at a store: each is a wait, and no work."""


def storage_path(where: str | Path | RemotePath) -> Path | RemotePath:
    """The path that a person names: a local path, or a URL of a store.

    Raises:
        UsageError: fsspec cannot open such a store here, the URL has a password in it, or it names no path there.
    """
    if not isinstance(where, str):
        return where
    if "://" not in where:
        return Path(where)
    protocol, _, path = where.partition("://")
    if protocol in ("file", "local"):
        return Path(path)
    if redact(where).startswith(f"{protocol}://{HIDDEN}@"):
        raise UsageError(
            f"{where} has a password in it, and paths are written into plans and logs. Leave it out: stores take keys"
            " from the environment, or from files of their own."
        )
    try:
        fsspec.get_filesystem_class(protocol)
    except (ValueError, ImportError) as error:
        raise UsageError(f"{where}: {error}. Give a folder, or a URL of a store that fsspec can open here.") from None
    if ("/" not in path.strip("/") and protocol != "memory") or not path.strip("/"):
        raise UsageError(f"{where} names no folder on the store; write {protocol}://BUCKET/RUN.")
    return RemotePath(f"{protocol}://{path.strip('/')}")


def _validated(value: object) -> Path | RemotePath:
    if not isinstance(value, str | Path | RemotePath):
        raise ValueError(f"a path or a URL is needed, and this is a {type(value).__name__}")
    return storage_path(value)


# A plain validator: a "before" validator would have to return JSON types where a config is read from JSON.
StoragePath = Annotated[Path | RemotePath, PlainValidator(_validated), PlainSerializer(str, when_used="json")]
"""A path of this machine or on a store; in a config, what `storage_path` makes of a text."""


def make_folder(folder: Path | RemotePath) -> None:
    """Create a folder and its missing parents; on a store a folder exists when something is in it."""
    if isinstance(folder, Path):
        safe_paths.make_folder(folder)


def remove_file(path: Path | RemotePath) -> None:
    """Remove a file, where there is one."""
    if isinstance(path, RemotePath):
        path.unlink(missing_ok=True)
    else:
        safe_paths.unlink(path)


def remove_folder(folder: Path | RemotePath) -> None:
    """Remove a folder and its contents, where there is one. What cannot be removed stays, with a warning."""
    if isinstance(folder, Path):
        safe_paths.remove_tree(folder)
        return
    try:
        folder.remove_tree()
    except OSError as error:
        logging.getLogger(__name__).warning("%s could not be removed; nothing needs it any more", error)


def relative_to(inner: Path | RemotePath, outer: Path | RemotePath) -> PurePath:
    """The path from `outer` to `inner`, which lies in it. ValueError where it does not."""
    if isinstance(inner, RemotePath):
        return inner.relative_to(outer)
    if isinstance(outer, RemotePath):
        raise ValueError(f"{inner} does not lie in {outer}")
    return inner.relative_to(outer)


def listing(folder: Path | RemotePath) -> dict[str, Stat | os.stat_result | None]:
    """The entries of a folder by name, None for folders; {} where there is no folder."""
    if isinstance(folder, RemotePath):
        return dict(folder.listing())
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return {}
    found: dict[str, Stat | os.stat_result | None] = {}
    for entry in entries:
        with suppress(FileNotFoundError):  # it has just gone
            follow = not entry.is_symlink() or entry.is_file()  # a broken link counts as an entry
            found[entry.name] = None if entry.is_dir() else entry.stat(follow_symlinks=follow)
    return found


def subfolders(folder: Path | RemotePath) -> list[str]:
    """The names of the folders in a folder, links to folders among them; [] where there is no folder. Unlike `listing`
    it asks nothing about files, of which there may be millions."""
    if isinstance(folder, RemotePath):
        return [name for name, stat in folder.listing().items() if stat is None]
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def table_source(where: Path | RemotePath) -> Path | BinaryIO:
    """What pyarrow can read a table from: the path itself, or the object's bytes in memory. RunError for a device."""
    return io.BytesIO(where.read_bytes()) if isinstance(where, RemotePath) else safe_paths.check_file(where)


def map_concurrent(function: Callable[[T], R], items: Iterable[T], remote: bool) -> Iterator[R]:
    """The function's results in order; with `remote`, where each call waits for a store, many run at once."""
    if not remote:
        yield from map(function, items)
        return
    rest = iter(items)
    for first in islice(rest, 1):  # alone: it opens the client that the others share; at once, each would open its own
        yield function(first)
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="store") as pool:
        while batch := list(islice(rest, 8 * AT_ONCE)):
            yield from pool.map(function, batch)
