"""Reader of json and jsonl lists, in chunks of bounded size.

A json may be an array of objects, one object a line, or one object in any of the shapes that pandas writes (`orient=`);
the last cannot be decoded in parts and is bounded by MAX_OBJECT.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import IO, Any

from capfilt.downloading.url_lists import files
from capfilt.downloading.url_lists.files import CHUNK_ROWS, BadRows, ChooseColumns, Chunk, ListFile, lines, open_text

MAX_OBJECT = 2**28
"""Characters of a json that is one object."""
Row = dict[str, Any]


def read_json(file: ListFile, choose: ChooseColumns, bad_rows: BadRows, url_col: str) -> Iterator[Chunk]:
    """Read a json or jsonl; lines of a jsonl that are no object are counted in `bad_rows`.

    Columns are those of the first chunk's rows; a row that lacks one has None there.
    `url_col`: the column of URLs, by which the shapes of pandas are told apart.

    Raises:
        ValueError: no JSON, or JSON that holds no rows.
    """
    with open_text(file) as text:
        rows = _jsonl_rows(text, bad_rows) if file.format == "jsonl" else _json_rows(text, url_col)
        first = list(islice(rows, CHUNK_ROWS))
        names = choose(sorted({str(name) for row in first for name in row}))
        rows = chain(first, rows)
        while chunk := list(islice(rows, CHUNK_ROWS)):
            yield {new: [row.get(old) for row in chunk] for new, old in names.items()}


def _jsonl_rows(text: IO[str], bad_rows: BadRows) -> Iterator[Row]:
    for line in lines(text):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            yield row
        else:
            bad_rows.count += 1


def _json_rows(text: IO[str], url_col: str) -> Iterator[Row]:
    """The rows of an array of objects, of one object a line, or of one object that is a whole table."""
    for number, (in_array, value) in enumerate(_values(text)):
        if not isinstance(value, dict):
            shown = "an array" if isinstance(value, list) else json.dumps(value)[:40]
            raise ValueError(f"allowed are an array of objects, one a URL, or one object a line; this holds {shown}")
        if not in_array and number == 0 and (table := _table_rows(value, url_col)) is not None:
            yield from table
        else:
            yield value


def _values(text: IO[str]) -> Iterator[tuple[bool, Any]]:
    """The values of one JSON array (True), decoded as they come, or values that follow one another (False)."""
    decoder, buffer, in_array = json.JSONDecoder(), text.read(files.BLOCK), False
    while not buffer.strip() and (more := text.read(files.BLOCK)):
        buffer = more
    if (position := _skip_space(buffer, 0)) < len(buffer) and buffer[position] == "[":
        in_array, position = True, position + 1
    while True:
        position = _skip_space(buffer, position, ",")
        if in_array and buffer[position : position + 1] == "]":
            return
        try:
            value, position = decoder.raw_decode(buffer, position)
        except (ValueError, RecursionError) as error:
            buffer, position = buffer[position:], 0
            # Read as much again as there is: a large value is then decoded a few times, and not once a block.
            if len(buffer) <= MAX_OBJECT and (more := text.read(max(files.BLOCK, len(buffer)))):
                buffer += more
                continue
            if not in_array and not buffer.strip():
                return
            raise ValueError(_why_not_json(buffer, error)) from None
        yield in_array, value


def _why_not_json(buffer: str, error: Exception) -> str:
    if len(buffer) > MAX_OBJECT:
        return f"one value of more than {MAX_OBJECT} characters; write jsonl or Parquet, which are read row by row"
    if isinstance(error, RecursionError):
        return f"nested too deeply: {buffer[:80]!r}"
    return f"this is no JSON: {buffer[:80]!r}"


def _skip_space(buffer: str, position: int, also: str = "") -> int:
    while position < len(buffer) and buffer[position] in " \t\r\n" + also:
        position += 1
    return position


# ---- one object that is a whole table, by pandas' `orient` ----


def _table_rows(value: Row, url_col: str) -> Iterator[Row] | None:
    """The rows of an object that holds a whole table; None where the object is a row itself."""
    if isinstance(value.get("data"), list) and isinstance(value.get("columns"), list):  # split
        return _named(value["columns"], value["data"])
    if isinstance(value.get("data"), list) and "schema" in value:  # table
        return _objects(value["data"])
    if value and all(isinstance(column, list) for column in value.values()):  # list
        return _named(list(value), _zipped(value))
    if not value or not all(isinstance(column, dict) for column in value.values()):
        return None
    labels = next(iter(value.values())).keys()
    if url_col not in value and url_col in labels:  # index
        return iter(value.values())
    if any(column.keys() != labels for column in value.values()):
        raise ValueError("an object of columns, which have not the same labels")
    return _named(list(value), _zipped({name: list(column.values()) for name, column in value.items()}))  # columns


def _objects(rows: list[Any]) -> Iterator[Row]:
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("`data` is to hold objects, one a URL")
    return iter(rows)


def _zipped(columns: Mapping[str, Sequence[Any]]) -> Iterator[tuple[Any, ...]]:
    sizes = {name: len(column) for name, column in columns.items()}
    if len(set(sizes.values())) > 1:
        shown = ", ".join(f"{name}: {size}" for name, size in list(sizes.items())[:10])
        raise ValueError(f"an object of columns, which are not of one length ({shown})")
    return zip(*columns.values(), strict=True)


def _named(names: Any, rows: Any) -> Iterator[Row]:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, list | tuple) or len(row) != len(names):
            raise ValueError(f"row {number} of the table has not {len(names)} cells, one for each of its columns")
        yield dict(zip(names, row, strict=True))
