"""Lance, by its own library (extra `lance`): rows in order, 16 MiB read ahead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from capfilt.errors import NoShardError, ShardError

_AHEAD = 16 * 2**20
"""Bytes that Lance may read ahead; its own default is 2 GiB."""


def layout(location: str) -> tuple[pa.Schema, tuple[tuple[int, int], ...]]:
    """The schema of a dataset, and the rows of each fragment; of their bytes nothing is known."""
    dataset = _open(location)
    return dataset.schema, tuple((fragment.count_rows(), 0) for fragment in dataset.get_fragments())


def version(location: str) -> str:
    """What tells one version of a dataset from another."""
    dataset = _open(location)
    latest = max(dataset.versions(), key=lambda one: one["version"])
    return f"{latest['version']} {latest['timestamp']}"


def read(location: str, names: list[str], first: int, last: int) -> Iterator[pa.RecordBatch | str]:
    """The rows of a range, one at a time; where one cannot be read, why, and then the end."""
    bounds = {"batch_readahead": 1, "fragment_readahead": 1, "io_buffer_size": _AHEAD, "batch_size": 1}
    try:
        yield from _open(location).to_batches(
            columns=names, offset=first, limit=last + 1 - first, scan_in_order=True, **bounds
        )
    except (ValueError, RuntimeError, pa.ArrowException) as error:
        yield f"damaged Lance dataset: {' '.join(str(error).split())[:100]}"


def _open(location: str) -> Any:
    try:
        import lance
    except ImportError:
        raise NoShardError(f"{location} is read with Lance's library: pip install 'capfilt[lance]'.") from None
    try:
        return lance.dataset(location)
    except (ValueError, OSError, RuntimeError) as error:
        raise ShardError(f"{location} is no Lance dataset: {' '.join(str(error).split())[:200]}") from error
