"""Parquet with pictures in it: row groups, a page at a time, within bounds that are checked by the file's footer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from capfilt.data.shards.unpack import FREE_BYTES, MAX_RATIO
from capfilt.errors import ShardError

MAX_GROUP = 8 * 2**30
"""Bytes of the columns that are read of a row group; memory holds a few pages of it."""
_BUFFER = 2**20
_ROWS = 1
"""Rows of a batch: a dictionary's one picture may stand in all of them."""


def layout(location: str) -> tuple[pa.Schema, tuple[tuple[int, int], ...]]:
    """The schema of a file, and the rows and bytes of each row group. ShardError for a file that is no Parquet."""
    with ExitStack() as stack:
        file = _open(location, stack)
        groups = (file.metadata.row_group(number) for number in range(file.num_row_groups))
        return file.schema_arrow, tuple((group.num_rows, max(group.total_byte_size, 0)) for group in groups)


def read(location: str, names: list[str], first: int, last: int) -> Iterator[pa.RecordBatch | str]:
    """The rows of a range, one at a time; where a row group cannot be read, why, and then the end."""
    with ExitStack() as stack:
        file = _open(location, stack)
        start = 0
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            skip, stop = max(first - start, 0), min(last + 1 - start, group.num_rows)
            start += group.num_rows
            if skip >= stop:
                continue
            if problem := _problem(group, names):
                yield problem
                return
            try:
                for place, batch in enumerate(file.iter_batches(_ROWS, [number], columns=names, use_threads=False)):
                    if place >= stop:
                        break
                    if place >= skip:
                        yield batch
            except (pa.ArrowException, OSError) as error:
                if not _is_damage(error):
                    raise
                yield f"damaged Parquet: {' '.join(str(error).split())[:100]}"
                return


def _problem(group: Any, names: list[str]) -> str:
    """Why a row group is not read, or "": its stated sizes are beyond what such files have."""
    chunks = [group.column(number) for number in range(group.num_columns)]
    wanted = [chunk for chunk in chunks if f"{chunk.path_in_schema}.".startswith(tuple(f"{name}." for name in names))]
    packed = sum(max(chunk.total_compressed_size, 0) for chunk in wanted)
    whole = sum(max(chunk.total_uncompressed_size, 0) for chunk in wanted)
    if whole > MAX_GROUP:
        return f"a row group larger than {MAX_GROUP // 2**30} GiB"
    if whole > max(FREE_BYTES, MAX_RATIO * packed):
        return f"a row group that unpacks to more than {MAX_RATIO} times its bytes"
    return ""


def _open(location: str, stack: ExitStack) -> pq.ParquetFile:
    try:
        source = stack.enter_context(fsspec.open(location, "rb"))
        return stack.enter_context(pq.ParquetFile(source, pre_buffer=False, buffer_size=_BUFFER))
    except (pa.ArrowException, OSError) as error:
        if not _is_damage(error):
            raise
        raise ShardError(f"{location} is no Parquet that can be read: {' '.join(str(error).split())[:200]}") from error


def _is_damage(error: Exception) -> bool:
    """Whether the bytes are at fault, and not their storage: Arrow raises OSErrors without a number too."""
    return isinstance(error, pa.ArrowException) or (type(error) is OSError and error.errno is None)
