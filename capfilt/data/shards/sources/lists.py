"""The lists of a folder of pictures: `metadata.csv` or `.jsonl` as imagefolder has them, or one csv, tsv or jsonl.

A row names a picture, by its path from the list or by a name that one picture alone has, and says its texts; several
rows of one picture are several texts. A list is read once for its names, and once for each shard.
"""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Generator, Mapping
from contextlib import closing
from functools import lru_cache
from itertools import islice
from typing import IO, TYPE_CHECKING, Any

import fsspec

from capfilt.data.shards.groups import parse_json
from capfilt.data.shards.members import MAX_TEXT
from capfilt.data.shards.sources import columns, rows
from capfilt.data.shards.sources.rows import Row
from capfilt.data.shards.sources.view import size_and_time
from capfilt.errors import NoShardError, ShardError

if TYPE_CHECKING:
    from capfilt.data.shards.sources.folder import Listing

LISTS = (".csv", ".tsv", ".jsonl")
MAX_ROWS = 10_000_000
"""Rows of a list; the names of pictures that are not there are held in memory."""

Line = tuple[str, "dict[str, Any] | str"]
"""The path of a picture from the folder, and the row about it; or the place of a row, and why it names none."""


def names(folder: str, listed: Listing, options: Mapping[str, str]) -> list[str]:
    """The pictures of a folder and those that its lists name, sorted; each path once.

    Raises:
        NoShardError: it has several lists, or one of which it is not known what its columns are.
        ShardError: a list that breaks off.
    """
    if not _lists(folder, listed, options):
        return listed.pictures
    return _names(folder, listed, tuple(options.items()), repr(versions(folder, listed, options)))


@lru_cache(maxsize=4)
def _names(folder: str, listed: Listing, options: tuple[tuple[str, str], ...], _versions: str) -> list[str]:
    return sorted({*listed.pictures, *(path for path, _ in _lines(folder, listed, dict(options)))})


def told(folder: str, listed: Listing, options: Mapping[str, str], wanted: set[str]) -> dict[str, Row | str]:
    """What the lists say of some pictures, by path; in place of a row that cannot be used, why."""
    found: dict[str, Row | str] = {}
    texts = {path: _columns(folder, path, options)[1] for path in _lists(folder, listed, options)}
    for path, values in _lines(folder, listed, options):
        if path not in wanted:
            continue
        if isinstance(values, str):
            found[path] = values
            continue
        name = next((text for text in texts.values() if text in values), "")
        before = found.get(path)
        said = rows.texts_of(values.pop(name or "", None))
        if isinstance(before, Row):
            found[path] = Row((*before.texts, *said), meta=before.meta)
        else:
            found[path] = Row(said, meta=rows.meta_of({key: value for key, value in values.items() if value != ""}))
    return found


def versions(folder: str, listed: Listing, options: Mapping[str, str]) -> list[Any]:
    """What tells the lists of a folder from how they were before."""
    return [(path, *size_and_time(f"{folder.rstrip('/')}/{path}")) for path in _lists(folder, listed, options)]


def _lists(folder: str, listed: Listing, options: Mapping[str, str]) -> list[str]:
    """The paths of the lists of a folder: those called metadata, else the one at its top that names pictures."""
    if chosen := options.get("list"):
        if chosen not in listed.others:
            raise NoShardError(f"{folder} has no list {chosen}; lists are {', '.join(LISTS)} files in it.")
        return [chosen]
    found = sorted(path for path in listed.others if path.endswith(LISTS))
    if called := [path for path in found if path.rpartition("/")[2].rpartition(".")[0] == "metadata"]:
        return called
    top = [path for path in found if "/" not in path and columns.known(_header(folder, path), columns.FILE)]
    if len(top) > 1:
        raise NoShardError(f"{folder} has several lists of pictures: say which, {folder}#list={top[0]} or {top[1]}.")
    return top


def _columns(folder: str, path: str, options: Mapping[str, str]) -> tuple[str, str | None]:
    """The columns of names and of texts of a list."""
    header = _header(folder, path)
    for name in (options.get("image"), options.get("text")):
        if name and name not in header:
            raise NoShardError(f"{folder}/{path} has no column {name!r}. Columns: {', '.join(header[:20])}.")
    file = options.get("image") or columns.known(header, columns.FILE)
    if file is None:
        raise NoShardError(
            f"{folder}/{path}: which column names the pictures: {', '.join(header[:20])}? Write {folder}#image=COLUMN."
        )
    others = [name for name in header if name != file]
    text = options.get("text", columns.known(others, columns.TEXT))
    if text is None and others:
        raise NoShardError(
            f"{folder}/{path}: which column holds the texts: {', '.join(others[:20])}? Write"
            f" {folder}#text={others[0]}, or {folder}#text= for none."
        )
    return file, text or None


def _header(folder: str, path: str) -> list[str]:
    with closing(_records(folder, path)) as records:
        return next(([*values] for _, values in records if isinstance(values, dict)), [])


def _lines(folder: str, listed: Listing, options: Mapping[str, str]) -> Generator[Line, None, None]:
    """Every row of the lists."""
    for path in _lists(folder, listed, options):
        file, _ = _columns(folder, path, options)
        home = path.rpartition("/")[0]
        for number, values in islice(_records(folder, path), MAX_ROWS + 1):
            if number > MAX_ROWS:
                raise ShardError(f"{folder}/{path} has more than {MAX_ROWS:,} rows; split the folder.")
            place = f"{path}, row {number}"
            name = values.pop(file, None) if isinstance(values, dict) else None
            if isinstance(values, str):
                yield place, values
            elif not isinstance(name, str) or not name:
                yield place, "it names no picture"
            elif (exact := posixpath.normpath(f"{home}/{name}".lstrip("/"))) in listed.paths:
                yield exact, values
            elif one := listed.by_name.get(name.rpartition("/")[2]):
                yield one, values
            else:
                yield exact, "no such picture in the folder"


def _records(folder: str, path: str) -> Generator[tuple[int, dict[str, Any] | str], None, None]:
    """The rows of a csv, tsv or jsonl by column, numbered from 1; in place of one that is broken, why."""
    try:
        with (
            fsspec.open(f"{folder.rstrip('/')}/{path}", "rb") as file,
            closing(_json_lines(file) if path.endswith(".jsonl") else _table(file, path)) as records,
        ):
            yield from enumerate(records, 1)
    except (csv.Error, RecursionError) as error:
        raise ShardError(f"{folder}/{path} cannot be read as {path.rpartition('.')[2]}: {error}.") from error


def _json_lines(file: IO[bytes]) -> Generator[dict[str, Any] | str, None, None]:
    while line := file.readline(MAX_TEXT + 1):
        try:
            yield parse_json(line) if len(line) <= MAX_TEXT else f"a row larger than {MAX_TEXT // 2**20} MiB"
        except ValueError as error:
            yield str(error)


def _table(file: IO[bytes], path: str) -> Generator[dict[str, Any] | str, None, None]:
    # What is not UTF-8 becomes half characters, with which the row fails as a text.
    with io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="") as text:
        if path.endswith(".tsv"):
            reader = csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            reader = csv.reader(text)
        header = next(reader, [])
        for values in reader:
            if len(values) == len(header):
                yield dict(zip(header, values, strict=True))
            elif values:
                yield f"it has {len(values)} columns, not {len(header)}"
