"""Lists of URLs: csv, tsv, txt, json, jsonl and Parquet, streamed in tables of bounded size.

A column has one type in all shards, as in img2dataset, which reads a list whole and then knows it. A stream knows
only what has come so far: where a later row does not fit, `Clash` says so, and the reader begins anew with a
wider type.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice, takewhile
from typing import Any
from urllib.parse import unquote

import fsspec
import pyarrow as pa
from braceexpand import braceexpand
from pydantic import field_validator, model_validator

from capfilt.config import Config
from capfilt.downloading.column_types import Clash, Types, fit
from capfilt.downloading.list_formats import BATCH, Source, read
from capfilt.errors import DataError, did_you_mean
from capfilt.redact import is_redacted, redact

FORMATS = ("csv", "tsv", "txt", "json", "jsonl", "parquet")
MAX_FILES = 1_000_000

Partitions = tuple[tuple[str, str | None], ...]
_PARTITION = re.compile(r"([^=/.]+)=([^/]*)")
_NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"
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


def find(specs: Sequence[str], form: str | None = None) -> list[Source]:
    """The files that are named: files, folders, globs, braces, fsspec URLs. `form` where their names do not tell.

    Raises:
        DataError: a name that leads nowhere, or to a file of no known format.
    """
    if form is not None and form not in FORMATS:
        raise DataError(f"input format {form!r}; allowed are {', '.join(FORMATS)}.{did_you_mean(form, FORMATS)}")
    found = [source for spec in specs for piece in _patterns(spec) for source in _found(piece, form)]
    if len(found) > MAX_FILES:
        raise DataError(f"more than {MAX_FILES} lists are named; download them apart")
    if not found:
        raise DataError(f"no list of URLs given; allowed are {', '.join(FORMATS)}, also as .gz and .zst")
    return found


def identity(source: Source, columns: Columns) -> dict[str, Any]:
    """What tells one version of a list from another: the storage's own tag, else the sha256 of its bytes; and those of
    `columns` that its folders' names say."""
    try:
        files, path = fsspec.core.url_to_fs(source.url)
        info = files.info(path)
        tag = next((str(info[key]) for key in ("ETag", "etag") if info.get(key)), "")
        if not tag:
            with files.open(path, "rb") as file:
                tag = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        raise DataError(f"the list {source.url} cannot be read: {error}") from error
    outside = {name: value for name, value in source.partitions if name in columns.wanted.values()}
    told = {"partitions": outside} if outside else {}
    return {"name": redact(path).rpartition("/")[2], "size": info.get("size"), "version": tag, **told}


def tables(source: Source, columns: Columns, types: Types, bad: list[str]) -> Iterator[pa.Table]:
    """Stream a list as tables with the columns of `columns.wanted`; rows that are no rows go to `bad`.

    `types` holds the type of every column, and is filled by the first table. Where a text's column holds lists of
    texts, the first is the text, and a column `captions` has all of them as a sample's json does.

    Raises:
        DataError: the list cannot be read, or lacks a column.
        Clash: a column needs a wider type than `types` says.
    """
    outside = dict(source.partitions)
    spelled = columns.wanted.keys() if source.form in ("csv", "tsv") else set()
    try:
        for taken in read(source, partial(_choose, source, columns), columns.url_col, bad):
            count = len(next(iter(taken.values())))
            fixed = {new: [outside[old]] * count for new, old in columns.wanted.items() if new not in taken}
            whole = {**taken, **fixed}
            yield fit({name: whole[name] for name in columns.wanted}, types, {*spelled, *fixed})
    except DataError as error:
        raise error if source.url in str(error) else DataError(f"the list {source.url}: {error}") from error
    except (pa.ArrowException, OSError, UnicodeError, ValueError) as error:
        raise DataError(f"the list {source.url} cannot be read: {' '.join(str(error).split())[:300]}") from error


def _patterns(spec: str) -> list[str]:
    """A name with braces as the names that it stands for; one that exists as it is written stands for itself."""
    if os.path.exists(spec):
        return [spec]
    try:
        return list(islice(braceexpand(spec), MAX_FILES + 1))
    except ValueError as error:
        raise DataError(f"braces in {spec!r}: {error}; write {{00..10}} or {{a,b}}") from error


def _found(spec: str, form: str | None) -> Iterator[Source]:
    if is_redacted(spec):
        raise DataError(f"{spec} lacks a secret, which run folders do not keep; give the address in full")
    files, path = fsspec.core.url_to_fs(spec)
    try:
        # What exists is taken letter by letter: `[2]` is no pattern where a file is called so, nor a web server's `?`.
        web = spec.startswith(("http://", "https://"))
        if files.exists(path):
            hits = {path: files.info(path)}
        else:
            hits = {} if web else dict(sorted(files.glob(path, detail=True).items()))
        paths = [
            (inner, parts)
            for hit, info in hits.items()
            for inner, parts in (_inside(files, hit, form) if info["type"] == "directory" else [(hit, _hive(hit))])
        ]
    except (OSError, ValueError) as error:
        raise DataError(f"{spec} cannot be looked at: {error}") from error
    if not paths:
        what = f".{form} files" if form else "lists (" + ", ".join(FORMATS) + ", also as .gz and .zst)"
        raise DataError(f"no list found at {spec}; allowed are {what}, folders and globs of them, fsspec URLs")
    for found, parts in paths:
        source = _source(files.unstrip_protocol(found) if "://" in spec else found, found, form)
        assert source is not None, "an unknown format was raised"
        yield replace(source, partitions=parts)


def _inside(files: Any, folder: str, form: str | None) -> Iterator[tuple[str, Partitions]]:
    """The lists in a folder, also in folders below it that Hive made: `lang=en/part-0.parquet`."""
    base = folder.rstrip("/")
    for path in sorted(files.find(folder)):
        *above, name = path[len(base) :].strip("/").split("/")
        hidden = name.startswith((".", "_"))  # bookkeeping: _metadata, ._part-0.parquet
        if not hidden and all(_PARTITION.fullmatch(part) for part in above) and _source(path, path, form, quiet=True):
            yield path, _hive(path)


def _hive(path: str) -> Partitions:
    """What the folders right above a file say of its rows."""
    above = takewhile(lambda match: match is not None, map(_PARTITION.fullmatch, reversed(path.split("/")[:-1])))
    pairs = [(unquote(match[1]), unquote(match[2])) for match in above if match]
    return tuple((name, None if value == _NO_PARTITION else value) for name, value in reversed(pairs))


def _source(url: str, path: str, form: str | None, quiet: bool = False) -> Source | None:
    """A file as a source by its name; in a folder (`quiet`) what is no list, or of another format, is passed over."""
    *_, ending = name = (path.partition("?")[0] if "://" in path else path).rpartition("/")[2].lower().split(".")
    packed = _PACKED.get(ending, "")
    told = name[-2] if packed and len(name) > 1 else ending
    told = _ALIKE.get(told, told)
    if quiet:
        return Source(url, told, packed) if told in FORMATS and form in (None, told) else None
    known = form or told
    if known not in FORMATS:
        raise DataError(f"{url}: its name does not say what it is; say --input-format {' | '.join(FORMATS)}")
    return Source(url, known, packed)


def _choose(source: Source, columns: Columns, there: Sequence[str]) -> dict[str, str]:
    """Which columns are taken from a file, new name -> name there; the others are said by its folders' names."""
    outside = dict(source.partitions)
    for new, name in columns.wanted.items():
        if name not in there and (new == "url" or name not in outside):
            known = [*there, *outside]
            shown = ", ".join(known[:20]) or "none"
            raise DataError(
                f"the list {source.url} has no column {name!r}.{did_you_mean(name, known)} Columns: {shown}."
                " Say --url-col, --caption-col or --save-additional-columns."
            )
    chosen = {new: old for new, old in columns.wanted.items() if old in there}
    if twice := [old for old in chosen.values() if there.count(old) > 1]:
        raise DataError(f"the list {source.url} has several columns called {twice[0]!r}; rename all but one")
    return chosen


__all__ = ["BATCH", "FORMATS", "Clash", "Columns", "Source", "find", "identity", "tables"]
