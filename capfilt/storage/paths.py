"""Where a run lies: a folder of this machine, or a folder on any store that fsspec knows, s3://bucket/run.

A `RemotePath` has pathlib's methods, as far as run folders need them. How a file appears whole or not at all on a store
is decided here alone: an object is written by one PUT, or by an upload in parts that becomes an object with its last
request; until then nobody sees it. No answer of a store is cached: another process may have written since.
"""

from __future__ import annotations

import fnmatch
import io
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path, PurePath, PurePosixPath
from typing import Annotated, Any, BinaryIO, TypeVar

import fsspec
from pydantic import PlainSerializer, PlainValidator

from capfilt.errors import UsageError
from capfilt.redact import HIDDEN, redact
from capfilt.storage import safe_paths

T = TypeVar("T")
R = TypeVar("R")

PART_BYTES = 16 * 2**20
"""Bytes of one part of an upload; twice as much goes in one request."""
AT_ONCE = 32
"""Questions that one process has open at a store: each is a wait, and no work."""


@dataclass(frozen=True)
class Stat:
    """What a store says of an object, by the names that os.stat has."""

    st_size: int
    st_mtime: float
    """Seconds since 1970 by the store's clock; 0 where it does not tell."""
    version: str = ""
    """What the store itself tells contents apart by; "" where it does not."""


@dataclass(frozen=True, order=True)
class RemotePath:
    """A place on a store: an object, or what a folder would be. Crosses a process border as its URL."""

    url: str

    def __str__(self) -> str:
        return self.url

    # ---- names ----

    def __truediv__(self, name: str | Path) -> RemotePath:
        return self.joinpath(str(name))

    def joinpath(self, *names: str) -> RemotePath:
        """The place of that name below this one."""
        pieces = [piece for name in names for piece in name.split("/") if piece not in ("", ".")]
        return RemotePath("/".join([self.url, *pieces]))

    @property
    def parts(self) -> tuple[str, ...]:
        """The store, then each name."""
        protocol, _, path = self.url.partition("://")
        first, *names = path.lstrip("/").split("/")
        return f"{protocol}://{first}", *names

    @property
    def name(self) -> str:
        """The last part."""
        return self.parts[-1]

    @property
    def stem(self) -> str:
        """The last part without its ending."""
        return PurePosixPath(self.name).stem

    @property
    def parent(self) -> RemotePath:
        """The place that this one is in; of a whole store itself."""
        return RemotePath("/".join(self.parts[:-1])) if len(self.parts) > 1 else self

    @property
    def parents(self) -> Sequence[RemotePath]:
        """The places that this one is in, the nearest first."""
        return [RemotePath("/".join(self.parts[:end])) for end in range(len(self.parts) - 1, 0, -1)]

    def with_name(self, name: str) -> RemotePath:
        """The neighbour of that name."""
        return self.parent / name

    def is_relative_to(self, other: Path | RemotePath) -> bool:
        """Whether this place is the other or lies in it."""
        return isinstance(other, RemotePath) and self.parts[: len(other.parts)] == other.parts

    def relative_to(self, other: Path | RemotePath) -> PurePosixPath:
        """The way from the other place to this one."""
        if not self.is_relative_to(other):
            raise ValueError(f"{self} does not lie in {other}")
        return PurePosixPath(*self.parts[len(other.parts) :])

    def absolute(self) -> RemotePath:
        """Itself: a URL is as good in any working directory."""
        return self

    resolve = absolute

    # ---- looking ----

    def stat(self) -> Stat:
        """Size and time of an object. FileNotFoundError where there is none."""
        with self._asked() as (files, path):
            return _stat(files.info(path))

    def is_file(self) -> bool:
        """Whether there is an object of this name."""
        try:
            with self._asked() as (files, path):
                return bool(files.info(path)["type"] == "file")
        except FileNotFoundError:
            return False

    def is_dir(self) -> bool:
        """Whether there is any object below."""
        with self._asked() as (files, path):
            return bool(files.isdir(path))

    def exists(self) -> bool:
        """Whether there is an object of this name, or below it."""
        with self._asked() as (files, path):
            return bool(files.exists(path))

    def listing(self) -> dict[str, Stat | None]:
        """What is in this folder by name, None for folders; {} where there is no folder. One request a thousand."""
        try:
            with self._asked() as (files, path):
                entries = files.ls(path, detail=True)
        except FileNotFoundError:
            return {}
        base = path.rstrip("/")  # the first name of a listing may be the folder's own: a marker that some tools leave
        return {
            entry["name"].rstrip("/").rpartition("/")[2]: None if entry["type"] == "directory" else _stat(entry)
            for entry in entries
            if entry["name"].rstrip("/") != base
        }

    def iterdir(self) -> Iterator[RemotePath]:
        """What is in this folder."""
        return (self / name for name in self.listing())

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """What matches below, as pathlib has it, without `**`."""
        first, _, rest = pattern.partition("/")
        if not any(sign in first for sign in "*?["):
            found = self / first
            yield from found.glob(rest) if rest else [found] * found.exists()
            return
        for name, stat in self.listing().items():
            if fnmatch.fnmatchcase(name, first) and (not rest or stat is None):
                yield from (self / name).glob(rest) if rest else [self / name]

    def read_bytes(self) -> bytes:
        """The whole object."""
        with self._asked() as (files, path):
            return bytes(files.cat_file(path))

    def read_text(self, encoding: str = "utf-8") -> str:
        """The whole object as text."""
        return self.read_bytes().decode(encoding)

    def open(self, mode: str = "rb") -> Any:
        """The object as a file to read from; it is written by `replaced` alone."""
        assert mode == "rb", "an object is written whole"
        with self._asked() as (files, path):
            return files.open(path, "rb")

    # ---- writing ----

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a folder is there when something is in it."""

    def write_bytes(self, data: bytes) -> None:
        """Write the object in one request: it is there whole or not at all."""
        with self._asked() as (files, path):
            files.pipe_file(path, data)

    @contextmanager
    def replaced(self) -> Iterator[BinaryIO]:
        """Open a file whose bytes become the object when the block ends, and never where it raises.

        The bytes wait in a file of this machine that has no name, so that a killed process leaves nothing, neither here
        nor there; a large one then goes in parts.
        """
        with tempfile.TemporaryFile() as file:
            yield file
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            if size <= PART_BYTES:
                self.write_bytes(file.read())
                return
            file.flush()
            with self._asked() as (files, path):
                files.put_file(f"/dev/fd/{file.fileno()}", path, chunksize=PART_BYTES)

    def create(self, data: bytes) -> bool:
        """Write an object that must not be there (on S3: If-None-Match), and say whether it is ours.

        A request whose answer got lost is made again and then refused: so what lies there decides, and `data` must be
        like that of nobody else.
        """
        try:
            with self._asked() as (files, path):
                # What fsspec does for a store that does not do it itself: it looks, then writes.
                if not files.async_impl and type(files).pipe_file is fsspec.AbstractFileSystem.pipe_file:
                    raise NotImplementedError("it has no conditional writes, so two drivers could not be kept apart")
                files.pipe_file(path, data, mode="create")
        except OSError as error:
            if isinstance(error.__cause__, NotImplementedError):
                raise
            return self.read_bytes() == data  # and where there is nothing, that is the error
        return True

    def append(self, line: bytes) -> None:
        """Add to an object. It is read and written again whole, so one process may do so at a time."""
        before = self.read_bytes() if self.is_file() else b""
        self.write_bytes(before + line)

    def copy_from(self, source: RemotePath) -> None:
        """Become a copy of another object, made by the store itself where it is the same one."""
        with self._asked() as (files, path), source._asked() as (others, there):
            if files is others:
                files.cp_file(there, path)
                return
        with source.open() as read, self.replaced() as file:
            while piece := read.read(PART_BYTES):
                file.write(piece)

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object."""
        try:
            with self._asked() as (files, path):
                files.rm_file(path)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def remove_all(self) -> None:
        """Remove everything below, where there is anything."""
        with suppress(FileNotFoundError), self._asked() as (files, path):
            files.rm(path, recursive=True)

    def sweep(self) -> int:
        """End the uploads that killed writers left unfinished below: nobody sees them, and they cost their room.

        Returns how many there were. Only the driver of a run may do this; S3 alone keeps such uploads until told.
        """
        with self._asked() as (files, path):
            if not hasattr(files, "abort_mpu"):
                return 0
            bucket, key, _ = files.split_path(path)
            try:
                told = files.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{key}/" if key else "")
            except PermissionError as error:
                logging.getLogger(__name__).warning("%s: unfinished uploads cannot be looked for (%s)", self, error)
                return 0
            for upload in told.get("Uploads", []):
                files.abort_mpu(bucket, upload["Key"], upload["UploadId"])
            return len(told.get("Uploads", []))

    @contextmanager
    def _asked(self) -> Iterator[tuple[Any, str]]:
        """The store, and this place's name there; whatever a client raises becomes an OSError that names the place."""
        try:
            # Workers write what drivers look for: a listing of a minute ago is wrong.
            files, path = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
            yield files, path
        except NotImplementedError as error:
            raise OSError(f"{self}: this store cannot do that ({error})") from error
        except OSError as error:
            if self.url in str(error):
                raise
            kinds = (FileNotFoundError, FileExistsError, PermissionError)
            kind = next((kind for kind in kinds if isinstance(error, kind)), OSError)
            raise kind(f"{self}: {error}") from error
        except Exception as error:
            raise OSError(f"{self}: {type(error).__name__}: {error}") from error


def storage_path(where: str | Path | RemotePath) -> Path | RemotePath:
    """The place that a person names: a path, or a URL of a store. UsageError for a store that is not known here."""
    if not isinstance(where, str):
        return where
    if "://" not in where:
        return Path(where)
    protocol, _, path = where.partition("://")
    if protocol in ("file", "local"):
        return Path(path)
    if redact(where).startswith(f"{protocol}://{HIDDEN}@"):
        raise UsageError(
            f"{where} has a password in it, and the name of a place is written down wherever it is used. Leave it out:"
            " stores take keys from the environment, or from files of their own."
        )
    try:
        fsspec.get_filesystem_class(protocol)
    except (ValueError, ImportError) as error:
        raise UsageError(f"{where}: {error}. Give a folder, or a URL of a store that fsspec can open here.") from None
    if ("/" not in path.strip("/") and protocol != "memory") or not path.strip("/"):
        raise UsageError(f"{where} names no place on the store; write {protocol}://BUCKET/RUN.")
    return RemotePath(f"{protocol}://{path.strip('/')}")


def _told(value: object) -> Path | RemotePath:
    if not isinstance(value, str | Path | RemotePath):
        raise ValueError(f"a path or a URL is needed, and this is a {type(value).__name__}")
    return storage_path(value)


# A plain validator: what comes before pydantic's own would have to be JSON again where a config is read from JSON.
StoragePath = Annotated[Path | RemotePath, PlainValidator(_told), PlainSerializer(str, when_used="json")]
"""A path or a place on a store; in a config, what `storage_path` makes of a text."""


def remove_all(folder: Path | RemotePath) -> None:
    """Remove a folder and what is in it, where there is one. It is tidying up: what cannot be removed stays."""
    if isinstance(folder, Path):
        safe_paths.remove_tree(folder)
        return
    try:
        folder.remove_all()
    except OSError as error:
        logging.getLogger(__name__).warning("%s stays, though it is of no use any more", error)


def relative_to(inner: Path | RemotePath, outer: Path | RemotePath) -> PurePath:
    """The way from a place to one that lies in it. ValueError where it does not."""
    if isinstance(inner, RemotePath):
        return inner.relative_to(outer)
    if isinstance(outer, RemotePath):
        raise ValueError(f"{inner} does not lie in {outer}")
    return inner.relative_to(outer)


def listing(folder: Path | RemotePath) -> dict[str, Stat | os.stat_result | None]:
    """What is in a folder by name, None for folders; {} where there is no folder."""
    if isinstance(folder, RemotePath):
        return dict(folder.listing())
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return {}
    return {entry.name: stat for entry in entries for stat in _stats(entry)}


def _stats(entry: os.DirEntry[str]) -> list[os.stat_result | None]:
    """What a folder says of one of its entries; nothing of one that has just gone. A link to nowhere is there."""
    try:
        return [None if entry.is_dir() else entry.stat(follow_symlinks=not entry.is_symlink() or entry.is_file())]
    except FileNotFoundError:
        return []


def table_source(where: Path | RemotePath) -> Path | BinaryIO:
    """What libraries read tables from: the path itself, or the object's bytes in memory. RunError for a device."""
    return io.BytesIO(where.read_bytes()) if isinstance(where, RemotePath) else safe_paths.check_file(where)


def map_concurrent(function: Callable[[T], R], items: Iterable[T], remote: bool) -> Iterator[R]:
    """The function's answers in order; with `remote`, where each waits for a store, many are asked at once."""
    if not remote:
        yield from map(function, items)
        return
    rest = iter(items)
    for first in islice(rest, 1):  # alone: it opens the client that the others share, and of which each would make one
        yield function(first)
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="store") as pool:
        while batch := list(islice(rest, 8 * AT_ONCE)):
            yield from pool.map(function, batch)


_TIMES = ("mtime", "LastModified", "last_modified", "updated", "modificationTime", "created")
_VERSIONS = ("ETag", "etag", "generation", "md5Hash", "blob_id")


def _stat(info: dict[str, Any]) -> Stat:
    """Sizes are called the same everywhere; times are not."""
    times = (info.get(name) for name in _TIMES)
    when = next((time for time in times if time), 0.0)
    if isinstance(when, str):
        when = datetime.fromisoformat(when)
    version = next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
    return Stat(int(info["size"] or 0), when.timestamp() if isinstance(when, datetime) else float(when), version)
