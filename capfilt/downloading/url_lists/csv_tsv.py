"""Readers of csv and tsv lists, in chunks of bounded size.

Every row of a file is accounted for: a reader gives it out, or counts it in `bad_rows`, or refuses the file, naming the
line. Quotes are not guessed at: a tsv has none, and a csv is held to RFC 4180 wherever a quoted field spans lines,
since one loose quote would otherwise swallow the rows behind it.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.csv

from capfilt.downloading.url_lists import files
from capfilt.downloading.url_lists.files import (
    CHUNK_ROWS,
    BadRows,
    ChooseColumns,
    Chunk,
    ListFile,
    lines,
    open_bytes,
    open_text,
)
from capfilt.errors import DataError

MAX_ROW_LINES = 10_000
"""Lines that one row of a csv may span; a field holds 131,072 characters at most (`csv.field_size_limit`)."""


def read_tsv(file: ListFile, choose: ChooseColumns, bad_rows: BadRows) -> Iterator[Chunk]:
    """Read a tsv as captioning data sets are written: a line is a row, a tab ends a field, quotes mean nothing."""

    def skip(row: Any) -> str:
        bad_rows.count += 1
        return "skip"

    def batches(stream: Any, **settings: Any) -> Any:
        read = pa.csv.ReadOptions(block_size=files.BLOCK)
        parse = pa.csv.ParseOptions(delimiter="\t", quote_char=False, invalid_row_handler=skip)
        return pa.csv.open_csv(stream, read_options=read, parse_options=parse, **settings)

    num_bad = bad_rows.count
    with open_bytes(file) as stream, batches(stream) as head:
        names = choose(head.schema.names)
    bad_rows.count = num_bad  # Arrow reads a block for the header; its bad rows are met again below
    wanted = list(names.values())
    convert = pa.csv.ConvertOptions(include_columns=wanted, column_types=dict.fromkeys(wanted, pa.string()))
    with open_bytes(file) as stream:
        for batch in batches(stream, convert_options=convert):
            table = pa.Table.from_batches([batch])
            yield {new: table[old] for new, old in names.items()}


def read_csv(file: ListFile, choose: ChooseColumns, bad_rows: BadRows) -> Iterator[Chunk]:
    """Read a csv; a row with more or fewer cells than the header is a bad one.

    Raises:
        DataError: a quote that swallows rows, or a header that has tabs.
    """
    rows = _csv_rows(file)
    header = next(rows, [])
    if len(header) == 1 and "\t" in header[0]:
        raise DataError("its first line has tabs and no commas; say --input-format tsv")
    positions = {new: header.index(old) for new, old in choose(header).items()}

    def complete_rows() -> Iterator[list[str]]:
        for row in rows:
            if len(row) == len(header):
                yield row
            else:
                bad_rows.count += 1

    complete = complete_rows()
    while chunk := list(islice(complete, CHUNK_ROWS)):
        yield {new: [row[position] for row in chunk] for new, position in positions.items()}


def _csv_rows(file: ListFile) -> Iterator[list[str]]:
    """The rows of a csv, the header first; DataError for a quote that swallows rows, naming the line that opens it."""
    row_lines: list[str] = []
    with open_text(file, newline="", errors="strict") as text:
        reader = csv.reader(_recorded(lines(text), row_lines), strict=True)
        num_before = num_columns = 0
        while True:
            row_lines.clear()
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                row = _row_despite(str(error), row_lines, num_before + 1)
            if len(row_lines) > 1 and _swallowed_rows(row_lines, num_columns):
                what = f"closes {len(row_lines) - 1} lines later, behind lines that are rows"
                raise _quote_error(row_lines, num_before + 1, what)
            num_before += len(row_lines)
            num_columns = num_columns or len(row)
            if row:
                yield row


def _recorded(text_lines: Iterator[str], row_lines: list[str]) -> Iterator[str]:
    """The lines as they are, each also appended to `row_lines`; no more than MAX_ROW_LINES for one row."""
    for line in text_lines:
        row_lines.append(line)
        if len(row_lines) > MAX_ROW_LINES:
            return  # to the parser the file ends inside a quoted field, which it reports
        yield line


def _row_despite(error: str, row_lines: list[str], number: int) -> list[str]:
    """A row that breaks RFC 4180: read as it stands if it is one line (`"a" b,c`), else DataError."""
    if "unexpected end" in error:
        within = f" within {MAX_ROW_LINES} lines" if len(row_lines) > MAX_ROW_LINES else ""
        raise _quote_error(row_lines, number, f"never closes{within}")
    if len(row_lines) > 1:
        raise _quote_error(row_lines, number, f"closes {len(row_lines) - 1} lines later in the middle of a field")
    if "field limit" in error:
        raise DataError(f"line {number} has a field of more than {csv.field_size_limit()} characters")
    return next(csv.reader(row_lines))


def _swallowed_rows(row_lines: list[str], num_columns: int) -> bool:
    """Whether lines inside a quoted field are rows themselves: as many cells as the header, one of them a URL."""
    cells = (line.rstrip("\r\n").split(",") for line in row_lines[:-1])
    return any(len(row) == num_columns and any("://" in cell for cell in row) for row in cells)


def _quote_error(row_lines: list[str], number: int, what: str) -> DataError:
    shown = row_lines[0].rstrip("\r\n")[:80] if row_lines else ""
    return DataError(
        f"line {number} opens a quote that {what}: {shown!r}. Close it, and double the quotes inside a quoted field; or"
        " write the list as tsv, which has no quoting, jsonl or Parquet"
    )
