"""Near pairs on disk: `pairs/*.parquet` with the columns a, b (rows of the pool), kind and distance.

A file has pairs of one kind, sorted by a, then b. They are read a million at a time: all of them need not fit memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from capfilt.errors import DataError
from capfilt.index.hamming import Pairs
from capfilt.storage.atomic import atomic
from capfilt.storage.paths import StoragePath, listing, table_source

FOLDER = "pairs"

SCHEMA = pa.schema(
    [
        pa.field("a", pa.int64(), nullable=False),
        pa.field("b", pa.int64(), nullable=False),
        pa.field("kind", pa.dictionary(pa.int8(), pa.string()), nullable=False),
        pa.field("distance", pa.float32(), nullable=False),
    ]
)

_BATCH = 2**20  # pairs


def write(path: StoragePath, kind: str, pairs: Pairs) -> None:
    """Write pairs of one kind, atomically."""
    kinds = pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(pairs.a), np.int8)), pa.array([kind]))
    table = pa.Table.from_arrays([pa.array(pairs.a), pa.array(pairs.b), kinds, pa.array(pairs.distance)], schema=SCHEMA)
    with atomic(path) as file:
        pq.write_table(table, file, compression="zstd", use_dictionary=["kind"])


@dataclass(frozen=True)
class PairFiles:
    """The pairs of a pool; may be iterated again and again, and each time is read from the files."""

    folder: StoragePath
    """`pairs` of a run folder."""
    kinds: Sequence[str]
    """In the order in which they were asked for."""
    num_rows: int
    """Of the pool."""

    def __iter__(self) -> Iterator[tuple[str, Pairs]]:
        for kind in self.kinds:
            for name in sorted(name for name in listing(self.folder) if name.startswith(f"{kind}-")):
                for pairs in _read(self.folder / name):
                    yield kind, pairs


def _read(path: StoragePath) -> Iterator[Pairs]:
    try:
        file: Any = pq.ParquetFile(table_source(path))
        for batch in file.iter_batches(_BATCH, columns=["a", "b", "distance"]):
            yield Pairs(*(column.to_numpy() for column in batch.columns))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {path}: {error}. Remove it and run the command again.") from error
