"""The Arrow files of `Dataset.save_to_disk`: streams of record batches, mapped into memory, so that only what is read
is loaded.

A stream has no index: the heads of its messages are read to know its rows. That needs a local file; and compressed
batches, whose size nothing bounds, are refused (`datasets` writes none).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate

import fsspec
import pyarrow as pa

from capfilt.errors import NoShardError, ShardError

_HEADER_TYPE, _HEADER = 1, 2
"""Fields of Arrow's `Message`, by number (format/Message.fbs)."""
_LENGTH, _COMPRESSION = 0, 3
"""Fields of `RecordBatch`."""


def layout(location: str) -> tuple[pa.Schema, tuple[tuple[int, int], ...]]:
    """The schema of a file, and the rows and bytes of each batch.

    Raises:
        NoShardError: it lies on a store.
        ShardError: it is no stream of Arrow's, or a compressed one.
    """
    path = _local(location)
    info = fsspec.filesystem("file").info(path)
    return _layout(path, info["size"], info["mtime"])


@lru_cache(maxsize=64)
def _layout(path: str, _size: int, _mtime: float) -> tuple[pa.Schema, tuple[tuple[int, int], ...]]:
    try:
        with pa.memory_map(path) as file:
            messages = pa.ipc.MessageReader.open_stream(file)
            schema = pa.ipc.read_schema(messages.read_next_message())
            return schema, tuple(_batch(path, message) for message in messages)
    except (pa.ArrowException, struct.error, EOFError, StopIteration) as error:
        raise ShardError(
            f"{path} is no stream of Arrow's, as Dataset.save_to_disk writes: {str(error) or 'it is empty'}"
        ) from error


def read(location: str, names: list[str], first: int, last: int) -> Iterator[pa.RecordBatch | str]:
    """The rows of a range, a batch at a time; where one is damaged, why, and then the end."""
    schema, groups = layout(location)
    ends = accumulate(count for count, _ in groups)
    options = pa.ipc.IpcReadOptions(included_fields=[schema.get_field_index(name) for name in names], use_threads=False)
    with pa.memory_map(_local(location)) as file:
        try:
            for end, batch in zip(ends, pa.ipc.open_stream(file, options=options), strict=True):
                start = end - batch.num_rows
                skip, stop = max(first - start, 0), min(last + 1, end) - start
                if skip < stop:
                    batch.validate(full=True)  # offsets that lead out of the file
                    yield batch.slice(skip, stop - skip)
        except (pa.ArrowException, ValueError) as error:
            yield f"damaged Arrow file: {' '.join(str(error).split())[:100]}"


def _batch(path: str, message: pa.Message) -> tuple[int, int]:
    """The rows and bytes of a batch, by its head, a flatbuffer. ShardError for one that is compressed."""
    head = message.metadata.to_pybytes()
    if message.type != "record batch":
        raise ShardError(f"{path} has a message that Dataset.save_to_disk writes none of: {message.type}.")
    (root,) = struct.unpack_from("<I", head)
    header = _field(head, root, _HEADER)
    batch = header + struct.unpack_from("<I", head, header)[0]
    if _field(head, batch, _COMPRESSION):
        raise ShardError(f"{path} has compressed batches; save it with Dataset.save_to_disk, or as Parquet.")
    length = _field(head, batch, _LENGTH)
    count = struct.unpack_from("<q", head, length)[0] if length else 0
    if count < 0:
        raise ShardError(f"{path} has a batch of {count} rows.")
    return count, message.body.size


def _field(head: bytes, table: int, number: int) -> int:
    """Where the field of a flatbuffer's table lies; 0 where it is absent."""
    vtable = table - struct.unpack_from("<i", head, table)[0]
    (size,) = struct.unpack_from("<H", head, vtable)
    offset = struct.unpack_from("<H", head, vtable + 4 + 2 * number)[0] if 4 + 2 * number < size else 0
    return table + offset if offset else 0


def _local(location: str) -> str:
    files, path = fsspec.core.url_to_fs(location)
    if "file" not in ((files.protocol,) if isinstance(files.protocol, str) else files.protocol):
        raise NoShardError(f"{location}: Arrow files are read from a disk; copy it there, or save it as Parquet.")
    return str(path)
