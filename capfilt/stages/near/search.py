"""near-lists, near-split: the rows of a pool that need not fit memory, by what brings near ones together.

Blocks of shards are written in the order of their keys (the list of a vector, a part of the hash), each by a stage on
the ledger. The pairs (`pairs`) and an index (`index`) are made from them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from capfilt.cluster.session import Session
from capfilt.cluster.worker_pool import Resources
from capfilt.config import Config, validate
from capfilt.data import embeddings
from capfilt.errors import DataError
from capfilt.index import lists, pair_files, segments, units
from capfilt.index.hamming import Pairs
from capfilt.index.lists import Lists
from capfilt.index.near import Near
from capfilt.index.pairs import near_in
from capfilt.index.pool import Pool
from capfilt.runs.ledger import Ledger, fingerprint
from capfilt.runs.progress import Progress
from capfilt.runs.tally import Tally
from capfilt.stages.runner import run_stage
from capfilt.storage import documents
from capfilt.storage.atomic import atomic, sha256_file, write_json
from capfilt.storage.paths import StoragePath

Scope = Literal["pool", "shard"]
"""Whether copies are searched in all shards, or only within each."""

FOLDER = "near"
LISTS = "lists.bin"
NAMES_ROWS = 4096
"""Rows of a table of names that are read at once."""


class Search(Config):
    """What the jobs of one search share."""

    step: ClassVar[str]

    out: StoragePath
    area: str = FOLDER
    """A folder in `out`: where the pool and what lies between the stages are."""
    pool: str = ""
    """The sha256 of `pool.json`."""
    lists: str = ""
    """The sha256 of `lists.bin`; "" where no vectors are compared, or not yet."""
    by: tuple[Near, ...]
    scope: Scope = "pool"
    probes: int = 4
    """Lists in which a vector is compared at most."""
    seed: int = 0
    names: bool = False
    """Whether keys and uids are written beside the vectors."""

    @property
    def name(self) -> str:
        """The stage, of a job."""
        return f"{self.area}-{self.step}"

    @property
    def work(self) -> StoragePath:
        """The folder of what lies between the stages."""
        return self.out / self.area

    @property
    def vector(self) -> Near | None:
        """How vectors are compared, if they are."""
        return next((near for near in self.by if near.kind == "vector"), None)

    def path(self, near: Near, block: str) -> StoragePath:
        """The records of a block, in the order of their keys."""
        return self.work / f"{near.kind}-{block}.bin"

    def exact_path(self, block: str) -> StoragePath:
        """The exact neighbours of the queries in a block."""
        return self.work / f"exact-{block}.parquet"

    def names_path(self, block: str) -> StoragePath:
        """The keys and uids of a block, in the order of its rows."""
        return self.work / f"names-{block}.parquet"

    def load(self) -> Pool:
        """The pool, which is read once."""
        return _pool(self.work / "pool.json", self.pool)

    def settings(self) -> dict[str, object]:
        """What determines the pairs of given rows."""
        return self.model_dump(mode="json", include={"by", "scope", "probes", "seed"})


@lru_cache(maxsize=2)
def _pool(path: StoragePath, sha256: str) -> Pool:
    return validate(Pool, documents.read_json(path, documents.PLAN_BYTES), path)


class ListsJob(Search):
    """Trains the centroids; its one item is "lists"."""

    step = "lists"
    unit: ClassVar[str] = "sets of lists"

    def identity(self, item: str) -> str:
        return fingerprint(item, self.settings(), [shard.sha256 for shard in self.load().shards])

    def open(self) -> Callable[[str], str]:
        return self.train

    def train(self, item: str) -> str:
        """Draw the sample and the queries, train on the one, and commit both."""
        pool = self.load()
        count = lists.num_lists(pool.num_rows)
        if count == 1:
            none = np.empty(0, np.int64)
            made = Lists(np.ones((1, pool.dim), np.float16), none, np.empty((0, pool.dim), np.float16))
        else:
            queries, sample = (
                pool.choose_rows(lists.QUERIES, self.seed + 1),
                pool.choose_rows(lists.SAMPLE * count, self.seed),
            )
            rows = np.union1d(queries, sample)
            vectors = pool.vectors(rows)
            trained = lists.train(vectors[np.isin(rows, sample)], count, self.seed)
            made = Lists(trained, queries, vectors[np.isin(rows, queries)])
        made.save(self.work / LISTS)
        Ledger(self.out, self.name).commit(item, self.identity(item), [self.work / LISTS], Tally.zero())
        return f"{count:,} lists"


class SplitJob(Search):
    """Writes the rows of blocks by their keys; an item is the name of a block."""

    step = "split"
    unit: ClassVar[str] = "blocks"
    only_reads: ClassVar[bool] = True

    def identity(self, item: str) -> str:
        """The fingerprint of the block's tables, of the lists and of the settings."""
        pool = self.load()
        block = [shard.model_dump(mode="json") for shard in pool.blocks[item]]
        return fingerprint(self.settings(), self.lists, pool.starts[pool.blocks[item][0].name], block)

    def open(self) -> Callable[[str], None]:
        known = Lists.load(self.work / LISTS) if self.vector else None
        nearest = known and lists.Nearest(known.centroids)

        def split(block: str) -> None:
            rows, columns, outputs = *self._columns(block), []
            if self.names:
                names = pa.table({name: columns[name] for name in ("key", "uid")})
                with atomic(self.names_path(block)) as file:
                    pq.write_table(names, file, compression="zstd", row_group_size=NAMES_ROWS)
                outputs.append(self.names_path(block))
            for near in self.by:
                if near.kind == "vector":
                    assert known is not None
                    assert nearest is not None
                    vectors = columns["vector"]
                    probed = lists.assign(nearest, vectors, near.within, self.probes)
                    keys, records = lists.records(rows, probed, vectors)
                    if len(known.queries) and not self.names:
                        outputs.append(self._search_exactly(block, known, rows, vectors, near))
                else:
                    keys, records = units.split_hashes(near, columns[near.kind], rows)
                num_keys = units.num_keys(near, len(known.centroids) if known else 0)
                segments.write(self.path(near, block), keys, records, num_keys)
                outputs.append(self.path(near, block))
            tally = Tally(samples=Counter({"in": len(rows), "kept": len(rows)}))
            Ledger(self.out, self.name).commit(block, self.identity(block), outputs, tally)

        return split

    def _columns(self, block: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The row numbers of a block, and the values of each kind, of keys and of uids."""
        pool, kinds = self.load(), [*(near.kind for near in self.by), *(("key", "uid") if self.names else ())]
        rows: list[np.ndarray] = []
        columns: dict[str, list[np.ndarray]] = {kind: [] for kind in kinds}
        for start, table in pool.read(pool.blocks[block], "vector" in kinds):
            rows.append(np.arange(start, start + table.num_rows))
            for kind in kinds:
                columns[kind].append(values_of(table, kind))
        return np.concatenate(rows), {kind: np.concatenate(parts) for kind, parts in columns.items()}

    def _search_exactly(
        self, block: str, known: Lists, rows: np.ndarray, vectors: np.ndarray, near: Near
    ) -> StoragePath:
        found = []
        for i, j, distance in near_in(known.vectors, vectors, near.within):
            query, row = known.queries[i], rows[j]
            other = query != row
            found.append(Pairs(query[other], row[other], distance[other]))
        pair_files.write(self.exact_path(block), near.kind, Pairs.concat(found))
        return self.exact_path(block)


def stored(job: Search, pool: Pool) -> Search:
    """Write the pool where workers read it; returns the job that knows it."""
    write_json(job.work / "pool.json", pool.model_dump(mode="json"))
    return job.model_copy(update={"pool": sha256_file(job.work / "pool.json")})


def prepare(session: Session, job: Search, pool: Pool, resources: Resources, show: Progress) -> Search:
    """Train the lists, where vectors are compared, and write the rows by their keys; returns the job that knows all."""
    if job.vector:
        run_stage(session, ListsJob(**job.model_dump()), {"lists": "lists"}, resources, show, "lists")
        job = job.model_copy(update={"lists": sha256_file(job.work / LISTS)})
    run_stage(session, SplitJob(**job.model_dump()), {name: name for name in pool.blocks}, resources, show, "by list")
    return job


def values_of(table: pa.Table, kind: str) -> np.ndarray:
    """The values of a table that are compared, or of another column. DataError for a sha256 that is none."""
    if kind == "vector":
        return embeddings.matrix(table)
    column = table[kind]
    if kind == "sha256" and not pc.all(pc.match_substring_regex(column, "^[0-9a-f]{64}$"), min_count=0).as_py():
        raise DataError("a table has a sha256 that is not 64 hex digits: embed its shard again.")
    values: np.ndarray = column.to_numpy()
    return values
