"""Paths on a store that fsspec knows, s3://bucket/run, with the methods of pathlib that run folders need.

How a file appears whole or not at all on a store is decided here alone: an object is written by one PUT, or by an
upload in parts that becomes an object with its last request; until then nobody sees it. No answer of a store is
cached: another process may have written since.
"""

from __future__ import annotations

import fnmatch
import io
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import fsspec

PART_BYTES = 16 * 2**20
"""Bytes of one part of an upload; twice as much goes in one request."""


@dataclass(frozen=True)
class Stat:
    """What a store reports about an object, by the names that os.stat has."""

    st_size: int
    st_mtime: float
    """Seconds since 1970 by the store's clock; 0 where the store has no times."""
    version: str = ""
    """The store's own name of these contents, an ETag say; "" where it has none."""


@dataclass(frozen=True, order=True)
class RemotePath:
    """A path on a store: an object, or what a folder would be. It is pickled as its URL."""

    url: str

    def __str__(self) -> str:
        return self.url

    # ---- names ----

    def __truediv__(self, name: str | Path) -> RemotePath:
        return self.joinpath(str(name))

    def joinpath(self, *names: str) -> RemotePath:
        """The path of that name below this one."""
        parts = [part for name in names for part in name.split("/") if part not in ("", ".")]
        return RemotePath("/".join([self.url, *parts]))

    @property
    def parts(self) -> tuple[str, ...]:
        """The store, then each name."""
        protocol, _, path = self.url.partition("://")
        first, *names = path.lstrip("/").split("/")
        return f"{protocol}://{first}", *names

    @property
    def name(self) -> str:
        return self.parts[-1]

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).stem

    @property
    def parent(self) -> RemotePath:
        """The folder that this path is in; of a whole store itself."""
        return RemotePath("/".join(self.parts[:-1])) if len(self.parts) > 1 else self

    @property
    def parents(self) -> Sequence[RemotePath]:
        """The folders that this path is in, the nearest first."""
        return [RemotePath("/".join(self.parts[:end])) for end in range(len(self.parts) - 1, 0, -1)]

    def with_name(self, name: str) -> RemotePath:
        """The path of that name in the same folder."""
        return self.parent / name

    def is_relative_to(self, other: Path | RemotePath) -> bool:
        """Whether this path is the other or lies in it."""
        return isinstance(other, RemotePath) and self.parts[: len(other.parts)] == other.parts

    def relative_to(self, other: Path | RemotePath) -> PurePosixPath:
        """The path from the other one to this one. ValueError where this one does not lie in it."""
        if not self.is_relative_to(other):
            raise ValueError(f"{self} does not lie in {other}")
        return PurePosixPath(*self.parts[len(other.parts) :])

    def absolute(self) -> RemotePath:
        """Itself: a URL is as good in any working directory."""
        return self

    resolve = absolute

    # ---- reading ----

    def stat(self) -> Stat:
        """Size and time of an object. FileNotFoundError where there is none."""
        with self._open_store() as (files, path):
            return _stat(files.info(path))

    def is_file(self) -> bool:
        """Whether there is an object of this name."""
        try:
            with self._open_store() as (files, path):
                return bool(files.info(path)["type"] == "file")
        except FileNotFoundError:
            return False

    def is_dir(self) -> bool:
        with self._open_store() as (files, path):
            return bool(files.isdir(path))

    def exists(self) -> bool:
        """Whether there is an object of this name, or below it."""
        with self._open_store() as (files, path):
            return bool(files.exists(path))

    def listing(self) -> dict[str, Stat | None]:
        """The entries of this folder by name, None for folders; {} where there is no folder.

        One request for each thousand of them.
        """
        try:
            with self._open_store() as (files, path):
                entries = files.ls(path, detail=True)
        except FileNotFoundError:
            return {}
        base = path.rstrip("/")  # a listing may begin with the folder itself: a marker object that some tools leave
        return {
            entry["name"].rstrip("/").rpartition("/")[2]: None if entry["type"] == "directory" else _stat(entry)
            for entry in entries
            if entry["name"].rstrip("/") != base
        }

    def iterdir(self) -> Iterator[RemotePath]:
        return (self / name for name in self.listing())

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """The paths below that match, as pathlib's glob, without `**`."""
        first, _, rest = pattern.partition("/")
        if not any(sign in first for sign in "*?["):
            path = self / first
            yield from path.glob(rest) if rest else [path] * path.exists()
            return
        for name, stat in self.listing().items():
            if fnmatch.fnmatchcase(name, first) and (not rest or stat is None):
                yield from (self / name).glob(rest) if rest else [self / name]

    def read_bytes(self) -> bytes:
        with self._open_store() as (files, path):
            return bytes(files.cat_file(path))

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def open(self, mode: str = "rb") -> Any:
        """The object as a file to read from; to write one, use `replaced`."""
        assert mode == "rb", "an object is written whole"
        with self._open_store() as (files, path):
            return files.open(path, "rb")

    # ---- writing ----

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a folder is there when something is in it."""

    def write_bytes(self, data: bytes) -> None:
        """Write the object in one request: it is there whole or not at all."""
        with self._open_store() as (files, path):
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
            with self._open_store() as (files, path):
                files.put_file(f"/dev/fd/{file.fileno()}", path, chunksize=PART_BYTES)

    def create(self, data: bytes) -> bool:
        """Write an object that must not exist yet (on S3: If-None-Match), and return whether it is ours.

        A request whose answer got lost is made again and then refused; so the contents decide, and `data` must differ
        from that of every other process.
        """
        try:
            with self._open_store() as (files, path):
                # fsspec's default for a store without conditional writes is a check and then a write.
                if not files.async_impl and type(files).pipe_file is fsspec.AbstractFileSystem.pipe_file:
                    raise NotImplementedError("it has no conditional writes, so two drivers could not be kept apart")
                files.pipe_file(path, data, mode="create")
        except OSError as error:
            if isinstance(error.__cause__, NotImplementedError):
                raise
            return self.read_bytes() == data  # FileNotFoundError where there is still no object
        return True

    def append(self, line: bytes) -> None:
        """Add to an object by reading and writing it whole, which only one process may do at a time."""
        before = self.read_bytes() if self.is_file() else b""
        self.write_bytes(before + line)

    def copy_from(self, source: RemotePath) -> None:
        """Copy another object here; within one store the store itself copies."""
        with self._open_store() as (files, path), source._open_store() as (source_files, source_path):
            if files is source_files:
                files.cp_file(source_path, path)
                return
        with source.open() as read, self.replaced() as file:
            while part := read.read(PART_BYTES):
                file.write(part)

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            with self._open_store() as (files, path):
                files.rm_file(path)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def remove_tree(self) -> None:
        """Remove everything below, where there is anything."""
        with suppress(FileNotFoundError), self._open_store() as (files, path):
            files.rm(path, recursive=True)

    def sweep(self) -> int:
        """Abort the uploads that killed writers left unfinished below, whose invisible parts use up space.

        Returns how many there were. Only the driver of a run may do this. S3 alone keeps such uploads until they are
        aborted.
        """
        with self._open_store() as (files, path):
            if not hasattr(files, "abort_mpu"):
                return 0
            bucket, key, _ = files.split_path(path)
            try:
                answer = files.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{key}/" if key else "")
            except PermissionError as error:
                logging.getLogger(__name__).warning("%s: unfinished uploads cannot be listed (%s)", self, error)
                return 0
            for upload in answer.get("Uploads", []):
                files.abort_mpu(bucket, upload["Key"], upload["UploadId"])
            return len(answer.get("Uploads", []))

    @contextmanager
    def _open_store(self) -> Iterator[tuple[Any, str]]:
        """The store and this path's name there. What a client raises becomes an OSError that names the path."""
        try:
            # Without a cache of listings: workers write what the driver looks for.
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


_TIMES = ("mtime", "LastModified", "last_modified", "updated", "modificationTime", "created")
_VERSIONS = ("ETag", "etag", "generation", "md5Hash", "blob_id")


def _stat(info: dict[str, Any]) -> Stat:
    """A Stat of what fsspec reports: it calls sizes the same for every store, and times not."""
    times = (info.get(name) for name in _TIMES)
    when = next((time for time in times if time), 0.0)
    if isinstance(when, str):
        when = datetime.fromisoformat(when)
    version = next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
    return Stat(int(info["size"] or 0), when.timestamp() if isinstance(when, datetime) else float(when), version)
