"""A pool of embeddings as one table: which shards, and which rows of the pool each has.

The rows of the pool are numbered through its shards, sorted by name, the rows of each in order. Only shards' names and
sizes are held in memory, and the rows of one block at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import accumulate

import pyarrow as pa

from capfilt.config import Config
from capfilt.data import embeddings, parquet
from capfilt.errors import DataError
from capfilt.storage.paths import StoragePath, map_concurrent
from capfilt.storage.atomic import sha256_file
from capfilt.storage.remote_path import RemotePath

BLOCK_ROWS = 2**18
"""Rows of a block, but for a larger shard: with 256 numbers each, 134 MB of vectors."""


class PoolShard(Config):
    """The table of one shard."""

    name: str
    rows: int
    sha256: str


class Pool(Config):
    """The tables of a run folder with embeddings, in the order of the pool."""

    folder: StoragePath
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
            DataError: vectors of two models, or no row in any table.
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
        known = {"dim": vectors.dim, "model": f"{vectors.kind} {vectors.model}"} if vectors else {}
        return cls(folder=folder.absolute(), shards=shards, **known)

    @property
    def num_rows(self) -> int:
        """Of all tables."""
        return sum(shard.rows for shard in self.shards)

    @cached_property
    def starts(self) -> dict[str, int]:
        """The number of each shard's first row."""
        starts = accumulate((shard.rows for shard in self.shards), initial=0)
        return dict(zip((shard.name for shard in self.shards), starts, strict=False))

    @cached_property
    def blocks(self) -> dict[str, tuple[PoolShard, ...]]:
        """Shards in a row with BLOCK_ROWS rows at most, by the name of the block."""
        blocks: list[list[PoolShard]] = [[]]
        for shard in self.shards:
            if blocks[-1] and sum(one.rows for one in blocks[-1]) + shard.rows > BLOCK_ROWS:
                blocks.append([])
            blocks[-1].append(shard)
        return {f"{number:05d}": tuple(block) for number, block in enumerate(blocks)}

    def read(self, block: tuple[PoolShard, ...], with_vectors: bool) -> Iterator[tuple[int, pa.Table]]:
        """The tables of a block that have rows, with the number of the first.

        Raises:
            DataError: a table that is not what it was, or has values that no picture has.
        """
        for shard in block:
            path = self.folder / embeddings.FOLDER / f"{shard.name}.parquet"
            table = embeddings.read(path, with_vectors)
            if table.num_rows != shard.rows:
                raise DataError(f"{path} has changed since it was counted: run the command again.")
            if table.num_rows:
                yield self.starts[shard.name], table
