"""Near pairs on disk: `pairs/*.parquet` with the columns a, b (rows of the pool), kind and distance.

A file has pairs of one kind, sorted by a, then b. They are read a million at a time: all of them need not fit memory.
With pairs of vectors goes the recall of the search, estimated on queries whose neighbours were searched exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from capfilt.config import Config
from capfilt.errors import DataError
from capfilt.index.hamming import Pairs
from capfilt.storage.atomic import atomic
from capfilt.storage.paths import StoragePath, table_source

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


class Recall(Config):
    """What an exact search of some rows found, and how much of it the lists did.

    A pair counts as found if the rows that stand for its two values were found near.
    """

    queries: int
    neighbours: int
    """Pairs of a query and another row within the radius."""
    found: int
    """Of these, by the lists."""

    @property
    def value(self) -> float | None:
        """In [0, 1]; None where no query has a neighbour."""
        return self.found / self.neighbours if self.neighbours else None


class PairFiles(Config):
    """The pairs of a pool; may be iterated again and again, and each time is read from the files."""

    where: StoragePath
    """The folder `pairs` of a run folder."""
    num_rows: int
    """Of the pool."""
    files: dict[str, tuple[str, ...]]
    """The names of the files by kind; the kinds in the order in which they were asked for."""

    recall: Recall | None = None
    """Of the pairs of vectors; None where every pair was compared."""

    @property
    def kinds(self) -> list[str]:
        return list(self.files)

    def __iter__(self) -> Iterator[tuple[str, Pairs]]:  # type: ignore[override]
        for kind in self.files:
            for pairs in self.of(kind):
                yield kind, pairs

    def of(self, kind: str) -> Iterator[Pairs]:
        """The pairs of one kind, a million at a time."""
        for name in self.files[kind]:
            yield from read(self.where / name)


def read(path: StoragePath) -> Iterator[Pairs]:
    """The pairs of one file, a million at a time. DataError for one that cannot be read."""
    try:
        file: Any = pq.ParquetFile(table_source(path))
        for batch in file.iter_batches(_BATCH, columns=["a", "b", "distance"]):
            yield Pairs(*(column.to_numpy() for column in batch.columns))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {path}: {error}. Remove it and run the command again.") from error


def estimate(num_queries: int, exact: Pairs, found: Callable[[], Iterable[Pairs]]) -> Recall:
    """Compare the exact pairs of queries with those that were found, which are read twice."""
    ends = np.unique(np.concatenate([exact.a, exact.b]))
    hubs = ends.copy()  # the rows that stand for them
    for a, b, distance in found():
        equal = (distance == 0) & np.isin(b, ends)
        hubs[np.searchsorted(ends, b[equal])] = a[equal]
    one, other = (hubs[np.searchsorted(ends, side)] for side in (exact.a, exact.b))
    wanted = _key(np.minimum(one, other), np.maximum(one, other))
    seen = one == other
    for a, b, _ in found():
        seen |= np.isin(wanted, _key(a, b))
    return Recall(queries=num_queries, neighbours=len(wanted), found=int(seen.sum()))


def _key(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    key: np.ndarray = a << 32 | b  # rows are below 2^31
    return key
