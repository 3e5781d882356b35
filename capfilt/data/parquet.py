"""Parquet tables that somebody else may have written, read in bounded memory.

A file of a few kilobytes can hold gigabytes: compressed pages, one long text that a million rows refer to, rows that
are counted and not stored. So the sizes that a file states are checked first, and then it is read a batch of rows at a
time, texts dictionary-encoded until their size is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from capfilt.errors import DataError
from capfilt.storage.atomic import atomic
from capfilt.storage.paths import StoragePath, table_source

MAX_ROWS = 300_000
"""Rows that are read of a table; a shard of 10,000 images with 11 texts each has 110,000."""
MAX_BYTES = 192 * 2**20
"""Bytes of these rows in memory, and of the pages that they are read from. `select` takes some 800 MB for such a
table."""
MAX_VALUES = 10_000_000
"""Values in one column of lists."""
MAX_WIDTH = 4096
"""Numbers of a vector."""

TOO_LARGE = f"has more than {MAX_ROWS:,} rows or {MAX_BYTES >> 20} MiB, and no table may: make smaller shards"

_BATCH = 8192  # rows

Chosen = Callable[[pa.RecordBatch], pa.Array]
"""Gives a mask of the rows of a batch that are wanted. Texts in the batch are dictionary-encoded."""


def write(path: StoragePath, table: pa.Table, **options: Any) -> None:
    """Write a table, zstd, atomically; `options` of pyarrow's writer. DataError for more than `read` takes."""
    if table.num_rows > MAX_ROWS or table.nbytes > MAX_BYTES:
        raise DataError(f"the shard of {path} {TOO_LARGE}.")
    with atomic(path) as file:
        pq.write_table(table, file, compression="zstd", **options)


def schema(path: StoragePath) -> pa.Schema:
    """The columns of a table. DataError for a file that is no Parquet."""
    try:
        return pq.read_schema(table_source(path))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def num_rows(path: StoragePath) -> int:
    """How many rows a table says that it has. DataError for a file that is no Parquet."""
    try:
        return int(pq.read_metadata(table_source(path)).num_rows)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def read(path: StoragePath, columns: Sequence[str] | None = None, chosen: Chosen | None = None) -> pa.Table:
    """The rows of a table, all or those that `chosen` gives, with all of its columns or some.

    Raises:
        DataError: no such file, not Parquet, a column whose values have no bound, or more than MAX_ROWS or MAX_BYTES.
    """
    try:
        source = table_source(path)
        plain = pq.ParquetFile(source)
        stored = plain.schema_arrow
        names = stored.names if columns is None else list(columns)
        wanted = pa.schema([stored.field(name) for name in names])
        if unbounded := [field.name for field in wanted if not is_bounded(field.type)]:
            raise DataError(f"{path} has a column that no table here has: {unbounded[0]!r}; remove the file.")
        table = pa.Table.from_batches(list(_batches(path, source, plain, wanted, chosen)), wanted)
        table.validate(full=True)  # raises for texts that are not UTF-8
        return table
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def is_bounded(kind: pa.DataType) -> bool:
    """Whether a value of a type takes no more memory than in a page of the file."""
    types = pa.types
    if types.is_fixed_size_list(kind):  # a row that is null takes as much as the others
        return kind.list_size <= MAX_WIDTH and is_bounded(kind.value_type)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_struct(kind):
        return all(is_bounded(kind.field(i).type) for i in range(kind.num_fields))
    texts = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    return any(is_kind(kind) for is_kind in (types.is_primitive, types.is_decimal, types.is_null, *texts))


def _batches(
    path: StoragePath, source: Path | BinaryIO, plain: pq.ParquetFile, wanted: pa.Schema, chosen: Chosen | None
) -> Iterator[pa.RecordBatch]:
    columns = [plain.schema.column(i) for i in range(plain.metadata.num_columns)]
    indices = [i for i, column in enumerate(columns) if column.path.partition(".")[0] in wanted.names]
    _check_pages(path, plain.metadata, indices)
    texts = [columns[i].path for i in indices if columns[i].physical_type == "BYTE_ARRAY"]
    num_rows = num_bytes = 0
    file = pq.ParquetFile(source, metadata=plain.metadata, read_dictionary=texts)
    for batch in file.iter_batches(_BATCH, columns=wanted.names, use_threads=False):
        rows = batch.select(wanted.names)
        if chosen is not None:
            rows = rows.filter(chosen(rows))
        num_rows += rows.num_rows
        num_bytes += sum(map(_decoded_bytes, rows.columns))
        if num_rows > MAX_ROWS or num_bytes > MAX_BYTES:
            raise _too_large(path)
        if rows.num_rows:
            yield rows.cast(wanted)


def _check_pages(path: StoragePath, metadata: pq.FileMetaData, indices: Sequence[int]) -> None:
    """Raise DataError for columns whose stated size is too large: compressed, decompressed, or of their lists."""
    chunks = [metadata.row_group(g).column(i) for g in range(metadata.num_row_groups) for i in indices]
    pages = sum(max(chunk.total_uncompressed_size, chunk.total_compressed_size) for chunk in chunks)
    if pages > MAX_BYTES or any(chunk.num_values > MAX_VALUES for chunk in chunks):
        raise _too_large(path)


def _too_large(path: StoragePath) -> DataError:
    return DataError(f"{path} {TOO_LARGE}, or remove it")


def _decoded_bytes(values: pa.Array) -> int:
    """Bytes of the values once they are no longer dictionary-encoded."""
    kind = values.type
    if pa.types.is_dictionary(kind):
        lengths = pc.binary_length(values.dictionary).cast(pa.int64())
        return 4 * len(values) + int(pc.sum(lengths.take(values.indices)).as_py() or 0)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return 4 * len(values) + _decoded_bytes(values.flatten())
    if pa.types.is_struct(kind):
        return sum(map(_decoded_bytes, values.flatten()))
    return int(values.nbytes)
