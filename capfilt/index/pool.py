"""A pool of embeddings as one table: which shards, and which rows of the pool each has.

The rows of the pool are numbered through its shards, sorted by name, the rows of each in order. Only shards' names and
sizes are held in memory, and the rows of one block at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import accumulate

import numpy as np
import pyarrow as pa

from capfilt.config import Config
from capfilt.data import embeddings, parquet
from capfilt.errors import DataError
from capfilt.storage.atomic import sha256_file
from capfilt.storage.paths import StoragePath, map_concurrent
from capfilt.storage.remote_path import RemotePath

BLOCK_ROWS = 2**18
"""Rows of a block, but for a larger shard: with 256 numbers each, 134 MB of vectors."""

SAMPLE_SHARDS = 2000
"""Shards that a sample is drawn from at most."""
MAX_ROWS = 2**31 - 1
"""Of a pool: two row numbers fit 64 bits."""


class PoolShard(Config):
    """The table of one shard."""

    name: str
    rows: int
    sha256: str


class Pool(Config):
    """The tables of a run folder with embeddings, in the order of the pool."""

    source: StoragePath
    """The run folder."""
    shards: tuple[PoolShard, ...]
    dim: int = 0
    """Numbers of a vector; 0 where there are none."""
    model: str = ""
    """What made the vectors."""

    @classmethod
    def open(cls, folder: StoragePath, digests: dict[str, str]) -> Pool:
        """Read what the tables of a run folder say of themselves.

        `digests`: the sha256 of tables, by their path, that are known already; the others are read.

        Raises:
            FolderError: there are no tables.
            DataError: vectors of two models, no row in any table, or too many.
        """
        tables = embeddings.tables(folder)
        vectors = embeddings.check_same_model(tables.values())

        def shard(name: str) -> PoolShard:
            path = tables[name]
            sha256 = digests.get(str(path.absolute())) or sha256_file(path)
            return PoolShard(name=name, rows=parquet.num_rows(path), sha256=sha256)

        shards = tuple(map_concurrent(shard, tables, isinstance(folder, RemotePath)))
        if not any(one.rows for one in shards):
            raise DataError(f"{folder} has {len(shards)} tables and no picture in any: embed shards that have some.")
        if sum(one.rows for one in shards) > MAX_ROWS:
            raise DataError(f"{folder} has more than {MAX_ROWS:,} pictures: search it in parts.")
        known = {"dim": vectors.dim, "model": f"{vectors.kind} {vectors.model}"} if vectors else {}
        return cls(source=folder.absolute(), shards=shards, **known)

    @property
    def num_rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @cached_property
    def starts(self) -> dict[str, int]:
        """The number of each shard's first row."""
        starts = accumulate((shard.rows for shard in self.shards), initial=0)
        return dict(zip((shard.name for shard in self.shards), starts, strict=False))

    @cached_property
    def by_name(self) -> dict[str, PoolShard]:
        return {shard.name: shard for shard in self.shards}

    @cached_property
    def blocks(self) -> dict[str, tuple[PoolShard, ...]]:
        """Shards in a row with BLOCK_ROWS rows at most, by the name of the block; without those that have none."""
        blocks: list[list[PoolShard]] = [[]]
        for shard in filter(lambda shard: shard.rows, self.shards):
            if blocks[-1] and sum(one.rows for one in blocks[-1]) + shard.rows > BLOCK_ROWS:
                blocks.append([])
            blocks[-1].append(shard)
        return {f"{number:05d}": tuple(block) for number, block in enumerate(blocks)}

    def read(self, block: tuple[PoolShard, ...], with_vectors: bool) -> Iterator[tuple[int, pa.Table]]:
        """The tables of some shards, each with the number of its first row. DataError for a table that is not what it
        was, or has values that no picture has."""
        for shard in block:
            path = embeddings.path_of(self.source, shard.name)
            table = embeddings.read(path, with_vectors)
            if table.num_rows != shard.rows:
                raise DataError(f"{path} has changed since it was counted: run the command again.")
            yield self.starts[shard.name], table

    def choose_rows(self, wanted: int, seed: int) -> np.ndarray:
        """Random rows, each once, ascending; int64, a few less than wanted where the pool is small.

        They lie in SAMPLE_SHARDS shards at most: to sample a large pool, not all of it is read.
        """
        draw = np.random.default_rng(seed)
        chosen = np.sort(draw.permutation(len(self.shards))[:SAMPLE_SHARDS])
        sizes = np.array([self.shards[number].rows for number in chosen])
        ends = np.cumsum(sizes)
        places = np.unique(draw.integers(0, max(1, ends[-1]), wanted)) if ends[-1] else np.empty(0, np.int64)
        which = np.searchsorted(ends, places, "right")
        starts = np.array([self.starts[self.shards[number].name] for number in chosen])
        rows: np.ndarray = places - (ends - sizes)[which] + starts[which]
        return rows

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """The vectors of some rows, float16 [N, dim]; `rows` ascending. They are not checked, as `read` does."""
        ends = np.array([self.starts[shard.name] + shard.rows for shard in self.shards])
        which = np.searchsorted(ends, rows, "right")
        parts = [np.empty((0, self.dim), np.float16)]
        for number in np.unique(which).tolist():
            name = self.shards[number].name
            table = parquet.read(embeddings.path_of(self.source, name), ["vector"])
            parts.append(embeddings.matrix(table)[rows[which == number] - self.starts[name]])
        return np.concatenate(parts)
