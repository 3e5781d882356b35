"""The files of a list of URLs: found by name, told apart by their content, opened and decompressed.

A name that exists on disk is taken literally, so `list [2].csv` is a file and no pattern.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import IO, Any
from urllib.parse import unquote

import fsspec
import pyarrow as pa
from braceexpand import braceexpand

from capfilt.errors import DataError, ListError, did_you_mean
from capfilt.redact import is_redacted, redact

FORMATS = ("csv", "tsv", "txt", "json", "jsonl", "parquet")
MAX_FILES = 1_000_000
CHUNK_ROWS = 10_000
"""Rows of a chunk, at most."""
BLOCK = 2**20
"""Bytes read at a time."""
MAX_LINE = 16 * 2**20
"""Characters of a line; a file without line ends must not be taken into memory as one."""

Chunk = dict[str, Any]
"""Columns of a few rows, by their new names: Python lists or Arrow arrays of one length."""
ChooseColumns = Callable[[Sequence[str]], Mapping[str, str]]
"""From the columns of a file to those that are taken, as new name -> name there; DataError where one is missing."""


@dataclass
class BadRows:
    """The rows of a list that cannot be read: counted and not kept, since there may be a billion of them."""

    count: int = 0


Partitions = tuple[tuple[str, str | None], ...]
_PARTITION = re.compile(r"([^=/.]+)=([^/]*)")
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
_COMPRESSIONS = {"gz": "gzip", "zst": "zstd"}
_FORMAT_ALIASES = {"ndjson": "jsonl", "pq": "parquet"}


@dataclass(frozen=True)
class ListFile:
    """One file of a list."""

    url: str
    """A local path or an fsspec URL."""
    format: str
    """One of FORMATS."""
    compression: str = ""
    """gzip | zstd, or "" for none."""
    partitions: Partitions = ()
    """Column values of all its rows, from the names of its folders as Hive writes them: `lang=en/part-0.parquet`."""


# ---- which files ----


def find_files(specs: Sequence[str], format: str | None = None) -> list[ListFile]:
    """List the files that `specs` name: files, folders, globs, braces, fsspec URLs.

    `format`: one of FORMATS, for files whose names do not say it.

    Raises:
        ListError: a spec that matches no file, or a file of no known format.
    """
    if format is not None and format not in FORMATS:
        raise ListError(f"input format {format!r}; allowed are {', '.join(FORMATS)}.{did_you_mean(format, FORMATS)}")
    files = [file for spec in specs for path in _expand_braces(spec) for file in _files_at(path, format)]
    if len(files) > MAX_FILES:
        raise DataError(f"the lists have {len(files)} files; allowed are {MAX_FILES} in one run. Download them apart")
    if not files:
        raise ListError(f"no list of URLs given; allowed are {', '.join(FORMATS)}, also as .gz and .zst")
    return files


def identity(file: ListFile, columns: Iterable[str]) -> dict[str, Any]:
    """Tell one version of a file from another: its name, size, and the storage's etag, else the sha256 of its bytes.

    `columns`: names of the columns that are read; those that come from the folders' names are part of the identity.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        filesystem, path = fsspec.core.url_to_fs(file.url)
        info = filesystem.info(path)
        version = next((str(info[key]) for key in ("ETag", "etag") if info.get(key)), "")
        if not version:
            with filesystem.open(path, "rb") as stream:
                version = hashlib.file_digest(stream, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        raise DataError(f"the list {file.url} cannot be read: {error}") from error
    wanted = set(columns)
    partitions = {name: value for name, value in file.partitions if name in wanted}
    whole = {"name": redact(path).rpartition("/")[2], "size": info.get("size"), "version": version}
    return {**whole, "partitions": partitions} if partitions else whole


def _expand_braces(spec: str) -> list[str]:
    """The names that a name with braces stands for; one that exists as it is written stands for itself."""
    if os.path.exists(spec):
        return [spec]
    try:
        return list(islice(braceexpand(spec), MAX_FILES + 1))
    except ValueError as error:
        raise ListError(f"braces in {spec!r}: {error}; write {{00..10}} or {{a,b}}") from error


def _files_at(spec: str, format: str | None) -> Iterator[ListFile]:
    if is_redacted(spec):
        raise ListError(f"{spec} lacks a secret, which run folders do not keep; give the address in full")
    filesystem, path = fsspec.core.url_to_fs(spec)
    try:
        # What exists is taken literally: `[2]` is no pattern where a file has that name, nor a web server's `?`.
        is_web = spec.startswith(("http://", "https://"))
        if filesystem.exists(path):
            matches = {path: filesystem.info(path)}
        else:
            matches = {} if is_web else dict(sorted(filesystem.glob(path, detail=True).items()))
        paths: list[str] = []
        for match, info in matches.items():
            paths += _lists_in(filesystem, match, format) if info["type"] == "directory" else [match]
    except (OSError, ValueError) as error:
        raise DataError(f"{spec} cannot be listed: {error}") from error
    if not paths:
        allowed = f".{format} files" if format else "lists (" + ", ".join(FORMATS) + ", also as .gz and .zst)"
        raise ListError(f"no list found at {spec}; allowed are {allowed}, folders and globs of them, fsspec URLs")
    for path in paths:
        named, compression = _by_name(path)
        known = format or named
        url = filesystem.unstrip_protocol(path) if "://" in spec else path
        if known not in FORMATS:
            raise ListError(f"{url}: its name does not say its format; give --input-format {' | '.join(FORMATS)}")
        yield ListFile(url, known, compression, _partitions(path))


def _lists_in(filesystem: Any, folder: str, format: str | None) -> Iterator[str]:
    """The lists in a folder, and in the Hive partitions below it (`lang=en/part-0.parquet`)."""
    for path in sorted(filesystem.find(folder)):
        *above, name = path[len(folder.rstrip("/")) :].strip("/").split("/")
        hidden = name.startswith((".", "_"))  # bookkeeping: _metadata, ._part-0.parquet
        named, _ = _by_name(path)
        is_list = named in FORMATS and format in (None, named)
        if is_list and not hidden and all(_PARTITION.fullmatch(part) for part in above):
            yield path


def _partitions(path: str) -> Partitions:
    """The `name=value` folders right above a file."""
    above = takewhile(lambda match: match is not None, map(_PARTITION.fullmatch, reversed(path.split("/")[:-1])))
    pairs = [(unquote(match[1]), unquote(match[2])) for match in above if match]
    return tuple((name, None if value == _NULL_PARTITION else value) for name, value in reversed(pairs))


def _by_name(path: str) -> tuple[str, str]:
    """Format and compression by a file's name; the format is its ending, which need not be one of FORMATS."""
    *_, ending = name = (path.partition("?")[0] if "://" in path else path).rpartition("/")[2].lower().split(".")
    compression = _COMPRESSIONS.get(ending, "")
    if compression and len(name) > 1:
        ending = name[-2]
    return _FORMAT_ALIASES.get(ending, ending), compression


# ---- their bytes ----


@contextmanager
def open_bytes(file: ListFile) -> Iterator[Any]:
    """Open a file of a list, decompressed while it is read."""
    with ExitStack() as stack:
        stream = stack.enter_context(fsspec.open(file.url, "rb", expand=False))
        if file.compression:
            stream = stack.enter_context(pa.PythonFile(stream, mode="r"))
            stream = stack.enter_context(pa.CompressedInputStream(stream, file.compression))
        yield stream


@contextmanager
def open_text(file: ListFile, newline: str = "\n", errors: str = "replace") -> Iterator[IO[str]]:
    """Open a file of a list as UTF-8, with or without a byte order mark."""
    with open_bytes(file) as stream:
        buffered = io.BufferedReader(_RawStream(stream), BLOCK)
        with io.TextIOWrapper(buffered, encoding="utf-8-sig", errors=errors, newline=newline) as text:
            yield text


def lines(text: IO[str]) -> Iterator[str]:
    """The lines of a text with their ends; DataError for one of more than MAX_LINE characters."""
    number = 0
    while line := text.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise DataError(
                f"line {number} has more than {MAX_LINE} characters; is this the format that it is read as?"
            )
        yield line


class _RawStream(io.RawIOBase):
    """A stream of Arrow or fsspec as `io.BufferedReader` takes one."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
