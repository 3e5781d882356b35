"""Lists of URLs: csv, tsv, txt, json, jsonl and Parquet, streamed in tables of bounded size.

A column has one type in all shards, as in img2dataset, which reads a list whole and then knows it. A stream knows
only what has come so far: where a later row does not fit, `Clash` says so, and the reader begins anew with a
wider type.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from braceexpand import braceexpand
from pydantic import field_validator, model_validator

from capfilt.config import Config
from capfilt.data.typed import Clash, Types, fit, fit_text
from capfilt.errors import DataError, did_you_mean

FORMATS = ("csv", "tsv", "txt", "json", "jsonl", "parquet")
BATCH = 10_000
"""Rows of a table, at most."""
BLOCK = 2**20
"""Bytes read at a time; of a csv Arrow reads up to 32 of them ahead."""

_PACKED = {"gz": "gzip", "zst": "zstd"}
_ALIKE = {"ndjson": "jsonl", "pq": "parquet"}
_OURS = {
    "key", "caption", "url", "width", "height", "original_width", "original_height", "status", "error_message",
    "exif", "md5", "sha256", "sha512",
}  # fmt: skip


class Columns(Config):
    """Which columns of a list are taken; the names are img2dataset's."""

    url_col: str = "url"
    caption_col: str | None = None
    """The web text; without it the shards have no texts."""
    save_additional_columns: tuple[str, ...] = ()
    """Further columns that go into every json and Parquet as they are: DataComp's `uid`, say."""

    @field_validator("save_additional_columns")
    @classmethod
    def _not_ours(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if taken := sorted(_OURS.intersection(names)):
            raise ValueError(f"{', '.join(taken)} would overwrite a column of the output; rename it in the list")
        return names

    @model_validator(mode="after")
    def _each_once(self) -> Columns:
        names = list(self.wanted.values())
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"the column {twice[0]!r} is named twice; name each once: `url` and `caption` are kept too"
            )
        return self

    @property
    def wanted(self) -> dict[str, str]:
        """The list's name of every column of a plan, in img2dataset's order."""
        own = {name: name for name in self.save_additional_columns}
        return {**own, **({"caption": self.caption_col} if self.caption_col else {}), "url": self.url_col}


@dataclass(frozen=True)
class Source:
    """One file of a list."""

    url: str
    form: str
    packed: str = ""
    """gzip | zstd, where it is compressed."""


def find(specs: Sequence[str], form: str | None = None) -> list[Source]:
    """The files that are named: files, folders, globs, braces, fsspec URLs. `form` where their names do not tell.

    Raises:
        DataError: a name that leads nowhere, or to a file of no known format.
    """
    if form is not None and form not in FORMATS:
        raise DataError(f"input format {form!r}; allowed are {', '.join(FORMATS)}.{did_you_mean(form, FORMATS)}")
    found = [source for spec in specs for piece in braceexpand(spec) for source in _found(piece, form)]
    if not found:
        raise DataError(f"no list of URLs given; allowed are {', '.join(FORMATS)}, also as .gz and .zst")
    return found


def identity(source: Source) -> dict[str, Any]:
    """What tells one version of a list from another: the storage's own tag, else the sha256 of its bytes."""
    try:
        files, path = fsspec.core.url_to_fs(source.url)
        info = files.info(path)
        tag = next((str(info[key]) for key in ("ETag", "etag") if info.get(key)), "")
        if not tag:
            with files.open(path, "rb") as file:
                tag = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        raise DataError(f"the list {source.url} cannot be read: {error}") from error
    return {"name": path.rpartition("/")[2], "size": info.get("size"), "version": tag}


def tables(source: Source, columns: Columns, types: Types, bad: list[str]) -> Iterator[pa.Table]:
    """Stream a list as tables with the columns of `columns.wanted`; rows that are no rows go to `bad`.

    `types` holds the type of every column, and is filled by the first table.

    Raises:
        DataError: the list cannot be read, or lacks a column.
        Clash: a column needs a wider type than `types` says.
    """
    try:
        yield from _READERS[source.form](source, columns, types, bad)
    except (pa.ArrowException, OSError, UnicodeError, ValueError) as error:
        raise DataError(f"the list {source.url} cannot be read: {' '.join(str(error).split())[:300]}") from error


def _found(spec: str, form: str | None) -> Iterator[Source]:
    files, path = fsspec.core.url_to_fs(spec)
    try:
        if files.isdir(path):
            paths = [p for p in sorted(files.find(path, maxdepth=1)) if _source(p, p, form, quiet=True)]
        elif any(sign in spec for sign in "*?["):
            paths = sorted(files.glob(path))
        else:
            paths = [path] if files.exists(path) else []
    except (OSError, ValueError) as error:
        raise DataError(f"{spec} cannot be looked at: {error}") from error
    if not paths:
        what = f".{form} files" if form else "lists (" + ", ".join(FORMATS) + ", also as .gz and .zst)"
        raise DataError(f"no list found at {spec}; allowed are {what}, folders and globs of them, fsspec URLs")
    for found in paths:
        source = _source(files.unstrip_protocol(found) if "://" in spec else found, found, form)
        assert source is not None, "an unknown format was raised"
        yield source


def _source(url: str, path: str, form: str | None, quiet: bool = False) -> Source | None:
    """A file as a source by its name; in a folder (`quiet`) what is no list, or of another format, is passed over."""
    *_, ending = name = path.rpartition("/")[2].partition("?")[0].lower().split(".")
    packed = _PACKED.get(ending, "")
    told = name[-2] if packed and len(name) > 1 else ending
    told = _ALIKE.get(told, told)
    if quiet:
        return Source(url, told, packed) if told in FORMATS and form in (None, told) else None
    known = form or told
    if known not in FORMATS:
        raise DataError(f"{url}: its name does not say what it is; say --input-format {' | '.join(FORMATS)}")
    return Source(url, known, packed)


# ---- one reader a format ----


@contextmanager
def _opened(source: Source) -> Iterator[Any]:
    """The list's bytes, unpacked."""
    with ExitStack() as stack:
        file = stack.enter_context(fsspec.open(source.url, "rb"))
        if not source.packed:
            yield file
            return
        native = stack.enter_context(pa.PythonFile(file, mode="r"))
        yield stack.enter_context(pa.CompressedInputStream(native, source.packed))


def _check(source: Source, columns: Columns, there: Sequence[str]) -> None:
    for name in columns.wanted.values():
        if name not in there:
            shown = ", ".join(there[:20]) or "none"
            raise DataError(
                f"the list {source.url} has no column {name!r}.{did_you_mean(name, there)} Columns: {shown}."
                " Say --url-col, --caption-col or --save-additional-columns."
            )


def _separated(source: Source, columns: Columns, types: Types, bad: list[str]) -> Iterator[pa.Table]:
    csv = pa.csv

    def skip(row: Any) -> str:
        bad.append(str(row.text)[:200])
        return "skip"

    parse = csv.ParseOptions(
        delimiter="\t" if source.form == "tsv" else ",",
        newlines_in_values=source.form == "csv",
        invalid_row_handler=skip,
    )
    read = csv.ReadOptions(block_size=BLOCK)
    with _opened(source) as file, csv.open_csv(file, read_options=read, parse_options=parse) as head:
        there = head.schema.names
    _check(source, columns, there)
    bad.clear()  # what the look at the header has met is met again
    wanted = list(columns.wanted.values())
    convert = csv.ConvertOptions(include_columns=wanted, column_types=dict.fromkeys(wanted, pa.string()))
    with _opened(source) as file:
        reader = csv.open_csv(file, read_options=read, parse_options=parse, convert_options=convert)
        for batch in reader:
            table = pa.Table.from_batches([batch]).select(wanted).rename_columns(list(columns.wanted))
            yield fit_text(table, types)


def _lines(source: Source, columns: Columns, _types: Types, _bad: list[str]) -> Iterator[pa.Table]:
    _check(source, columns, [columns.url_col])
    with _text(source) as text:
        urls = (line.strip() for line in text)
        kept = (url for url in urls if url)
        while piece := list(islice(kept, BATCH)):
            yield pa.table({"url": pa.array(piece, pa.string())})


def _records(source: Source, columns: Columns, types: Types, bad: list[str]) -> Iterator[pa.Table]:
    with _text(source) as text:
        rows = _array(text) if source.form == "json" else _objects(text, bad)
        first = list(islice(rows, BATCH))
        _check(source, columns, sorted({str(name) for row in first for name in row}))
        rows = chain(first, rows)
        while piece := list(islice(rows, BATCH)):
            taken = {new: [row.get(old) for row in piece] for new, old in columns.wanted.items()}
            yield fit(taken, types)


def _parquet(source: Source, columns: Columns, types: Types, _bad: list[str]) -> Iterator[pa.Table]:
    with _opened(source) as file:
        if source.packed:
            raise DataError(f"{source.url}: a Parquet file is compressed inside; unpack it")
        parquet = pq.ParquetFile(file)
        _check(source, columns, parquet.schema_arrow.names)
        wanted = list(columns.wanted.values())
        for batch in parquet.iter_batches(batch_size=BATCH, columns=wanted):
            table = pa.Table.from_batches([batch]).select(wanted).rename_columns(list(columns.wanted))
            yield fit({name: table[name] for name in table.column_names}, types)


_READERS = {
    "csv": _separated, "tsv": _separated, "txt": _lines,
    "json": _records, "jsonl": _records, "parquet": _parquet,
}  # fmt: skip


@contextmanager
def _text(source: Source) -> Iterator[IO[str]]:
    with _opened(source) as file:
        buffered = io.BufferedReader(_Raw(file), BLOCK)
        with io.TextIOWrapper(buffered, encoding="utf-8-sig", errors="replace", newline="\n") as text:
            yield text


class _Raw(io.RawIOBase):
    """Arrow's and fsspec's files as `io` wants them."""

    def __init__(self, file: Any) -> None:
        super().__init__()
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._file.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)


def _objects(text: IO[str], bad: list[str]) -> Iterator[dict[str, Any]]:
    """The objects of a jsonl, one a line."""
    for line in text:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            yield row
        else:
            bad.append(line[:200])


def _array(text: IO[str]) -> Iterator[dict[str, Any]]:
    """The objects of one JSON array, decoded as they come; also those of a .json that is a jsonl."""
    decoder, buffer, at, listed = json.JSONDecoder(), text.read(BLOCK), 0, False
    while not buffer.strip() and (more := text.read(BLOCK)):
        buffer = more
    if (at := _past_space(buffer, 0)) < len(buffer) and buffer[at] == "[":
        listed, at = True, at + 1
    while True:
        at = _past_space(buffer, at, ",")
        if listed and buffer[at : at + 1] == "]":
            return
        try:
            row, at = decoder.raw_decode(buffer, at)
        except ValueError:
            more = text.read(BLOCK)
            if more:
                buffer, at = buffer[at:] + more, 0
                continue
            if not listed and not buffer[at:].strip():
                return
            raise ValueError(f"this is no JSON: {buffer[at : at + 80]!r}") from None
        if not isinstance(row, dict) or all(isinstance(value, dict) for value in row.values()):  # pandas' columns
            raise ValueError("allowed are an array of objects, one a URL, or one object a line")
        yield row


def _past_space(buffer: str, at: int, also: str = "") -> int:
    while at < len(buffer) and buffer[at] in " \t\r\n" + also:
        at += 1
    return at


__all__ = ["BATCH", "FORMATS", "Clash", "Columns", "Source", "find", "identity", "tables"]
