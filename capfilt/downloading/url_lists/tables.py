"""The rows of a list as Arrow tables of bounded size, with the columns that a download takes.

A column has one type in all shards, as in img2dataset, which reads a list whole and then knows it. A stream knows only
the rows so far: where a later row does not fit, `TypeClash` is raised, and the caller begins anew with a wider type.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import field_validator, model_validator

from capfilt.config import Config
from capfilt.downloading.url_lists.column_types import TypeClash, Types, typed_table
from capfilt.downloading.url_lists.csv_tsv import read_csv, read_tsv
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
from capfilt.downloading.url_lists.json_reader import read_json
from capfilt.errors import DataError, ListError, did_you_mean

_OUTPUT_COLUMNS = {
    "key", "caption", "url", "width", "height", "original_width", "original_height", "status", "error_message",
    "exif", "md5", "sha256", "sha512",
}  # fmt: skip


class Columns(Config):
    """Which columns of a list are taken; the names are img2dataset's."""

    url_col: str = "url"
    """The column of URLs."""
    caption_col: str | None = None
    """The web text; without it the shards have no texts."""
    save_additional_columns: tuple[str, ...] = ()
    """Further columns that go into every json and Parquet as they are: DataComp's `uid`, say."""

    @field_validator("save_additional_columns")
    @classmethod
    def _not_of_the_output(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if taken := sorted(_OUTPUT_COLUMNS.intersection(names)):
            raise ValueError(f"{', '.join(taken)} would overwrite a column of the output; rename it in the list")
        return names

    @model_validator(mode="after")
    def _each_once(self) -> Columns:
        names = list(self.by_new_name.values())
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"the column {repeated[0]!r} is named twice; name each once: `url` and `caption` are kept too"
            )
        return self

    @property
    def by_new_name(self) -> dict[str, str]:
        """The columns of a plan in img2dataset's order, new name -> name in the list."""
        additional = {name: name for name in self.save_additional_columns}
        return {**additional, **({"caption": self.caption_col} if self.caption_col else {}), "url": self.url_col}


def read_tables(file: ListFile, columns: Columns, types: Types, bad_rows: BadRows) -> Iterator[pa.Table]:
    """Stream a file of a list as tables with the columns of `columns.by_new_name`.

    Where the column of texts holds lists of texts, `caption` has the first of each, and a column `captions` has all of
    them in the form that a sample's json has.

    Args:
        types: the type of every column; filled by the first table, and used by all that follow.
        bad_rows: counts the rows that cannot be read.

    Raises:
        DataError: the file cannot be read, or lacks a column.
        TypeClash: a column needs a wider type than `types` has.
    """
    partitions = dict(file.partitions)
    as_text = columns.by_new_name.keys() if file.format in ("csv", "tsv") else set()
    try:
        for chunk in _chunks(file, partial(_choose, file, columns), bad_rows, columns.url_col):
            num_rows = len(next(iter(chunk.values())))
            constant = {
                new: [partitions[old]] * num_rows for new, old in columns.by_new_name.items() if new not in chunk
            }
            whole = {**chunk, **constant}
            yield typed_table({name: whole[name] for name in columns.by_new_name}, types, {*as_text, *constant})
    except DataError as error:
        raise error if file.url in str(error) else DataError(f"the list {file.url}: {error}") from error
    except (pa.ArrowException, OSError, UnicodeError, ValueError) as error:
        raise DataError(f"the list {file.url} cannot be read: {' '.join(str(error).split())[:300]}") from error


def check_columns(file: ListFile, columns: Columns) -> None:
    """Read the beginning of a file. ListError where it lacks a column, DataError where it cannot be read."""
    with suppress(TypeClash):
        next(read_tables(file, columns, {}, BadRows()), None)


def peek(file: ListFile, rows: int = 1000) -> dict[str, list[Any]]:
    """The first values of every column of a file, by the column's name, but of columns of bytes. DataError where it
    cannot be read."""
    try:
        heavy = _columns_of_bytes(file)
        chunks = _chunks(file, lambda names: {name: name for name in names if name not in heavy}, BadRows(), "url")
        chunk = next(iter(chunks), {})
        return {name: _first(values, rows) for name, values in chunk.items()}
    except (pa.ArrowException, OSError, UnicodeError, ValueError) as error:
        raise DataError(f"the list {file.url} cannot be read: {' '.join(str(error).split())[:300]}") from error


def _columns_of_bytes(file: ListFile) -> set[str]:
    """Columns that may hold whole pictures, as bytes or as structs with them."""
    if file.format != "parquet" or file.compression:
        return set()
    with open_bytes(file) as stream:
        fields = pq.read_schema(stream)
    kinds = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_struct)
    return {each.name for each in fields if any(kind(each.type) for kind in kinds)}


def _first(values: Any, rows: int) -> list[Any]:
    return values[:rows].to_pylist() if hasattr(values, "to_pylist") else list(values[:rows])


def _chunks(file: ListFile, choose: ChooseColumns, bad_rows: BadRows, url_col: str) -> Iterator[Chunk]:
    """Read a file by the reader of its format."""
    if file.format in ("json", "jsonl"):
        return read_json(file, choose, bad_rows, url_col)
    if file.format == "csv":
        return read_csv(file, choose, bad_rows)
    if file.format == "tsv":
        return read_tsv(file, choose, bad_rows)
    return _read_parquet(file, choose) if file.format == "parquet" else _read_txt(file, choose)


def _read_txt(file: ListFile, choose: ChooseColumns) -> Iterator[Chunk]:
    """Read one URL a line."""
    choose(["url"])
    with open_text(file) as text:
        urls = (url for line in lines(text) if (url := line.strip()))
        while chunk := list(islice(urls, CHUNK_ROWS)):
            yield {"url": chunk}


def _read_parquet(file: ListFile, choose: ChooseColumns) -> Iterator[Chunk]:
    if file.compression:
        raise DataError("a Parquet file is compressed inside; unpack it")
    with open_bytes(file) as stream:
        parquet = pq.ParquetFile(stream)
        names = choose(parquet.schema_arrow.names)
        for batch in parquet.iter_batches(batch_size=CHUNK_ROWS, columns=list(names.values())):
            table = pa.Table.from_batches([batch])
            yield {new: table[old] for new, old in names.items()}


def _choose(file: ListFile, columns: Columns, available: Sequence[str]) -> dict[str, str]:
    """Which columns are taken from a file, new name -> name there; the others come from its folders' names."""
    partitions = dict(file.partitions)
    for new, name in columns.by_new_name.items():
        if name not in available and (new == "url" or name not in partitions):
            known = [*available, *partitions]
            shown = ", ".join(known[:20]) or "none"
            raise ListError(
                f"the list {file.url} has no column {name!r}.{did_you_mean(name, known)} Columns: {shown}."
                " Say --url-col, --caption-col or --save-additional-columns."
            )
    chosen = {new: old for new, old in columns.by_new_name.items() if old in available}
    if repeated := [old for old in chosen.values() if available.count(old) > 1]:
        raise DataError(f"the list {file.url} has several columns called {repeated[0]!r}; rename all but one")
    return chosen
