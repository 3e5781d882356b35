"""How each format of a list of URLs is read: csv, tsv, txt, json, jsonl, Parquet, in pieces of bounded size.

Every row of a file is accounted for: it comes out of a reader, or it is put into `bad`, or the file is refused by one
line that says what was found where. Nothing is guessed about quotes: a TSV has none, and a csv is held to RFC 4180
wherever a quoted field spans lines, since one loose quote would otherwise swallow the rows behind it.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from capfilt.errors import DataError

BATCH = 10_000
"""Rows of a piece, at most."""
BLOCK = 2**20
"""Bytes read at a time."""
MAX_LINE = 16 * 2**20
"""Characters of a line; a file without line ends must not be taken into memory as one."""
MAX_LINES = 10_000
"""Lines that one row of a csv may span; a field holds 131,072 characters at most (`csv.field_size_limit`)."""
MAX_OBJECT = 2**28
"""Characters of a json that is one object, the columns of a table, say: it cannot be read in pieces."""

Piece = dict[str, Any]
"""Columns by their new names: lists, or Arrow's arrays."""
Needed = Callable[[Sequence[str]], Mapping[str, str]]
"""From the columns of a file to those that are taken: new name -> name there. Raises DataError where one is lacking."""


@dataclass(frozen=True)
class Source:
    """One file of a list."""

    url: str
    form: str
    packed: str = ""
    """gzip | zstd, where it is compressed."""
    partitions: tuple[tuple[str, str | None], ...] = ()
    """What the folders above it say of all its rows, as Hive writes it: `lang=en/part-0.parquet`."""


def read(source: Source, needed: Needed, url_col: str, bad: list[str]) -> Iterator[Piece]:
    """Stream the columns that `needed` chooses; rows that are no rows go to `bad`, shortened.

    `url_col`: the column of URLs, by which the shapes that pandas gives a json are told apart.
    """
    if source.form in ("json", "jsonl"):
        yield from _records(source, needed, url_col, bad)
    else:
        yield from _READERS[source.form](source, needed, bad)


# ---- the bytes ----


@contextmanager
def _opened(source: Source) -> Iterator[Any]:
    """The list's bytes, unpacked."""
    with ExitStack() as stack:
        file = stack.enter_context(fsspec.open(source.url, "rb", expand=False))
        if not source.packed:
            yield file
            return
        native = stack.enter_context(pa.PythonFile(file, mode="r"))
        yield stack.enter_context(pa.CompressedInputStream(native, source.packed))


@contextmanager
def _text(source: Source, newline: str = "\n", errors: str = "replace") -> Iterator[IO[str]]:
    with _opened(source) as file:
        buffered = io.BufferedReader(_Raw(file), BLOCK)
        with io.TextIOWrapper(buffered, encoding="utf-8-sig", errors=errors, newline=newline) as text:
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


def _lines(text: IO[str]) -> Iterator[str]:
    number = 0
    while line := text.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise DataError(
                f"line {number} has more than {MAX_LINE} characters; is this the format that it is read as?"
            )
        yield line


# ---- txt ----


def _txt(source: Source, needed: Needed, _bad: list[str]) -> Iterator[Piece]:
    needed(["url"])
    with _text(source) as text:
        kept = (url for line in _lines(text) if (url := line.strip()))
        while urls := list(islice(kept, BATCH)):
            yield {"url": urls}


# ---- csv and tsv ----


def _tsv(source: Source, needed: Needed, bad: list[str]) -> Iterator[Piece]:
    """A line is a row and a tab ends a field, whatever quotes there are: the convention of captioning data sets."""

    def skip(row: Any) -> str:
        bad.append(str(row.text)[:200])
        return "skip"

    def opened(file: Any, **settings: Any) -> Any:
        parse = pa.csv.ParseOptions(delimiter="\t", quote_char=False, invalid_row_handler=skip)
        return pa.csv.open_csv(file, read_options=pa.csv.ReadOptions(block_size=BLOCK), parse_options=parse, **settings)

    with _opened(source) as file, opened(file) as head:
        names = needed(head.schema.names)
    bad.clear()  # what the look at the header has met is met again
    wanted = list(names.values())
    convert = pa.csv.ConvertOptions(include_columns=wanted, column_types=dict.fromkeys(wanted, pa.string()))
    with _opened(source) as file:
        for batch in opened(file, convert_options=convert):
            table = pa.Table.from_batches([batch])
            yield {new: table[old] for new, old in names.items()}


def _csv(source: Source, needed: Needed, bad: list[str]) -> Iterator[Piece]:
    rows = _csv_rows(source)
    header = next(rows, [])
    if len(header) == 1 and "\t" in header[0]:
        raise DataError("its first line has tabs and no commas; say --input-format tsv")
    places = {new: header.index(old) for new, old in needed(header).items()}

    def whole() -> Iterator[list[str]]:
        for row in rows:
            if len(row) == len(header):
                yield row
            else:
                bad.append(str(row)[:200])

    kept = whole()
    while piece := list(islice(kept, BATCH)):
        yield {new: [row[place] for row in piece] for new, place in places.items()}


def _csv_rows(source: Source) -> Iterator[list[str]]:
    """The rows of a csv, the header first; DataError for a quote that swallows rows, naming the line that opens it."""
    held: list[str] = []
    with _text(source, newline="", errors="strict") as text:
        reader = csv.reader(_held(_lines(text), held), strict=True)
        before = columns = 0
        while True:
            held.clear()
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                row = _loose(held, before + 1, str(error))
            if len(held) > 1 and _swallowed(held, columns):
                raise _quote(held, before + 1, f"closes {len(held) - 1} lines later, behind lines that are rows")
            before += len(held)
            columns = columns or len(row)
            if row:
                yield row


def _held(lines: Iterator[str], held: list[str]) -> Iterator[str]:
    for line in lines:
        held.append(line)
        if len(held) > MAX_LINES:
            return  # to the parser an end inside a quoted field: named as such
        yield line


def _loose(held: list[str], number: int, said: str) -> list[str]:
    """A row that breaks RFC 4180: read as it stands if it is one line (`"a" b,c`), else the file is refused."""
    if "unexpected end" in said:
        raise _quote(
            held, number, f"never closes within {MAX_LINES} lines" if len(held) > MAX_LINES else "never closes"
        )
    if len(held) > 1:
        raise _quote(held, number, f"closes {len(held) - 1} lines later in the middle of a field")
    if "field limit" in said:
        raise DataError(f"line {number} has a field of more than {csv.field_size_limit()} characters")
    return next(csv.reader(held))


def _swallowed(held: list[str], columns: int) -> bool:
    """Whether lines inside a quoted field are rows themselves: as many cells as the header, one of them a URL."""
    cells = (line.rstrip("\r\n").split(",") for line in held[:-1])
    return any(len(row) == columns and any("://" in cell for cell in row) for row in cells)


def _quote(held: list[str], number: int, what: str) -> DataError:
    shown = held[0].rstrip("\r\n")[:80] if held else ""
    return DataError(
        f"line {number} opens a quote that {what}: {shown!r}. Close it, and double the quotes inside a quoted field; or"
        " write the list as tsv, which has no quoting, jsonl or Parquet"
    )


# ---- json and jsonl ----


def _records(source: Source, needed: Needed, url_col: str, bad: list[str]) -> Iterator[Piece]:
    with _text(source) as text:
        rows = _objects(text, bad) if source.form == "jsonl" else _json_rows(text, url_col)
        first = list(islice(rows, BATCH))
        names = needed(sorted({str(name) for row in first for name in row}))
        rows = chain(first, rows)
        while piece := list(islice(rows, BATCH)):
            yield {new: [row.get(old) for row in piece] for new, old in names.items()}


def _json_rows(text: IO[str], url_col: str) -> Iterator[dict[str, Any]]:
    """The rows of a json: an array of objects, one object a line, or one object that is a whole table."""
    for number, (listed, row) in enumerate(_values(text)):
        if not isinstance(row, dict):
            kind = "an array" if isinstance(row, list) else json.dumps(row)[:40]
            raise ValueError(f"allowed are an array of objects, one a URL, or one object a line; this holds {kind}")
        if not listed and number == 0 and (table := _table(row, url_col)) is not None:
            yield from table
        else:
            yield row


def _objects(text: IO[str], bad: list[str]) -> Iterator[dict[str, Any]]:
    """The objects of a jsonl, one a line."""
    for line in _lines(text):
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


def _values(text: IO[str]) -> Iterator[tuple[bool, Any]]:
    """The values of one JSON array (True), decoded as they come, or those that follow each other (False)."""
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
        except (ValueError, RecursionError) as error:
            buffer, at = buffer[at:], 0
            # As much again as there is: what does not fit a block is decoded a few times and not once a block.
            if len(buffer) <= MAX_OBJECT and (more := text.read(max(BLOCK, len(buffer)))):
                buffer += more
                continue
            if not listed and not buffer.strip():
                return
            raise ValueError(_no_json(buffer, error)) from None
        yield listed, row


def _no_json(buffer: str, error: Exception) -> str:
    if len(buffer) > MAX_OBJECT:
        return f"one value of more than {MAX_OBJECT} characters; write jsonl or Parquet, which are read row by row"
    if isinstance(error, RecursionError):
        return f"nested too deeply: {buffer[:80]!r}"
    return f"this is no JSON: {buffer[:80]!r}"


def _past_space(buffer: str, at: int, also: str = "") -> int:
    while at < len(buffer) and buffer[at] in " \t\r\n" + also:
        at += 1
    return at


def _table(found: dict[str, Any], url_col: str) -> Iterator[dict[str, Any]] | None:
    """The rows of an object that holds a whole table in one of pandas' shapes (`orient=`); None where it is a row."""
    if isinstance(found.get("data"), list) and isinstance(found.get("columns"), list):  # split
        return _named(found["columns"], found["data"])
    if isinstance(found.get("data"), list) and "schema" in found:  # table
        return _rows_only(found["data"])
    if found and all(isinstance(column, list) for column in found.values()):  # list
        return _named(list(found), _zipped(found))
    if not found or not all(isinstance(column, dict) for column in found.values()):
        return None
    labels = next(iter(found.values())).keys()
    if url_col not in found and url_col in labels:  # index
        return iter(found.values())
    if any(column.keys() != labels for column in found.values()):
        raise ValueError("an object of columns, which have not the same labels")
    return _named(list(found), _zipped({name: list(column.values()) for name, column in found.items()}))  # columns


def _rows_only(rows: list[Any]) -> Iterator[dict[str, Any]]:
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("`data` is to hold objects, one a URL")
    return iter(rows)


def _zipped(columns: Mapping[str, Sequence[Any]]) -> Iterator[tuple[Any, ...]]:
    sizes = {name: len(column) for name, column in columns.items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{name}: {size}" for name, size in list(sizes.items())[:10])
        raise ValueError(f"an object of columns, which are not of one length ({told})")
    return zip(*columns.values(), strict=True)


def _named(names: Any, rows: Any) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, list | tuple) or len(row) != len(names):
            raise ValueError(f"row {number} of the table has not {len(names)} cells, one for each of its columns")
        yield dict(zip(names, row, strict=True))


# ---- Parquet ----


def _parquet(source: Source, needed: Needed, _bad: list[str]) -> Iterator[Piece]:
    if source.packed:
        raise DataError("a Parquet file is compressed inside; unpack it")
    with _opened(source) as file:
        parquet = pq.ParquetFile(file)
        names = needed(parquet.schema_arrow.names)
        for batch in parquet.iter_batches(batch_size=BATCH, columns=list(names.values())):
            table = pa.Table.from_batches([batch])
            yield {new: table[old] for new, old in names.items()}


_READERS: Mapping[str, Callable[[Source, Needed, list[str]], Iterator[Piece]]] = {
    "csv": _csv, "tsv": _tsv, "txt": _txt, "parquet": _parquet,
}  # fmt: skip
