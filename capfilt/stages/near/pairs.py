"""near-join: all near pairs of a pool that need not fit memory.

The pool is cut twice: by blocks of shards, whose rows are written in the order of their keys (`search`), and by keys,
whose records are read out of all blocks and compared here. Each cut is a stage of its own on the ledger, spread over
workers; what lies between goes when the pairs are there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import ClassVar

import numpy as np

from capfilt.cluster.session import Session
from capfilt.cluster.worker_pool import Resources
from capfilt.config import validate
from capfilt.errors import DataError
from capfilt.index import lists, pair_files, segments, units
from capfilt.index.hamming import Pairs
from capfilt.index.lists import Lists
from capfilt.index.near import Near
from capfilt.index.pair_files import PairFiles, Recall, estimate
from capfilt.index.pool import Pool
from capfilt.index.units import Unit
from capfilt.runs.ledger import Ledger, fingerprint
from capfilt.runs.progress import Progress
from capfilt.runs.tally import Tally
from capfilt.stages.near.search import LISTS, ListsJob, Scope, Search, SplitJob, prepare, stored, values_of
from capfilt.stages.runner import digests, run_stage
from capfilt.storage import documents
from capfilt.storage.atomic import sha256_file, write_json
from capfilt.storage.paths import StoragePath, listing, remove_file, remove_folder

DONE = "near.json"


class JoinJob(Search):
    """Compares what lies under some keys; an item is KIND-NUMBER, a unit of `units.json`."""

    step = "join"
    unit: ClassVar[str] = "units"

    units: str
    """The sha256 of `units.json`."""

    def identity(self, item: str) -> str:
        """The fingerprint of all rows, of the lists and of the unit."""
        pool = self.load()
        rows = [shard.model_dump(mode="json") for shard in pool.shards]
        return fingerprint(self.settings(), self.lists, rows, item, self.planned()[item])

    def planned(self) -> dict[str, Unit]:
        return _units(self.work / "units.json", self.units)

    def open(self) -> Callable[[str], str]:
        return self.join

    def join(self, item: str) -> str:
        """Find the pairs of one unit and commit them."""
        kind, unit = item.partition("-")[0], self.planned()[item]
        near = next(near for near in self.by if near.kind == kind)
        paths = [self.path(near, block) for block in self.load().blocks]

        def read(part: int) -> tuple[np.ndarray, np.ndarray]:
            size = units.LIST_RECORDS
            part_of = (part * size, (part + 1) * size) if part >= 0 else (0, None)
            return segments.read(paths, unit.first, unit.last, *part_of)

        keys, one = read(unit.part)
        other = None if unit.other == unit.part else read(unit.other)[1]
        found = units.join(near, keys, one, other)
        path = self.out / pair_files.FOLDER / f"{item}.parquet"
        pair_files.write(path, kind, found)
        Ledger(self.out, self.name).commit(item, self.identity(item), [path], Tally.zero())
        return f"{len(found.a):,} pairs"


@lru_cache(maxsize=2)
def _units(path: StoragePath, sha256: str) -> dict[str, Unit]:
    return {name: Unit(*unit) for name, unit in documents.read_json(path, documents.PLAN_BYTES).items()}


class ShardJob(Search):
    """Finds the pairs within each shard; an item is the name of a shard."""

    step = "shards"
    unit: ClassVar[str] = "shards"
    only_reads: ClassVar[bool] = True

    def identity(self, item: str) -> str:
        """The fingerprint of the table, of the number of its first row and of the settings."""
        pool = self.load()
        return fingerprint(self.settings(), pool.starts[item], pool.by_name[item].model_dump(mode="json"))

    def open(self) -> Callable[[str], None]:
        def work(item: str) -> None:
            pool, outputs = self.load(), []
            shard = pool.by_name[item]
            for start, table in pool.read((shard,), self.vector is not None):
                rows = np.arange(start, start + shard.rows)
                for near in self.by:
                    path = self.out / pair_files.FOLDER / f"{near.kind}-{item}.parquet"
                    pair_files.write(path, near.kind, units.pairs_in_memory(near, values_of(table, near.kind), rows))
                    outputs.append(path)
            tally = Tally(samples=Counter({"in": shard.rows, "kept": shard.rows}))
            Ledger(self.out, self.name).commit(item, self.identity(item), outputs, tally)

        return work


def find_near_pairs(
    session: Session,
    embeddings: StoragePath,
    out: StoragePath,
    by: Sequence[Near],
    resources: Resources,
    show: Progress,
    scope: Scope = "pool",
) -> PairFiles:
    """Find all pairs of a pool that are near in one of the ways `by`, and write them to `out/pairs`.

    Pairs of hashes are complete; of vectors too in a pool of fewer than `lists.FLAT_BELOW` rows or with scope "shard",
    else the recall is estimated and returned with them. What is there already is not done again.

    Args:
        embeddings: a run folder with embeddings; its rows are numbered as `Pool` says.

    Raises:
        FolderError: there are no embeddings.
        DataError: vectors are to be compared and there are none, or those of two models; a damaged table; a radius
            within which one picture has very many others.
    """
    pool = Pool.open(embeddings, digests(Ledger(embeddings, "embed")))
    job = Search(out=out.absolute(), by=tuple(by), scope=scope)
    if job.vector and not pool.dim:
        raise DataError(f"{embeddings} has no vectors, which --by {job.vector} compares: embed with --model.")
    identity = fingerprint(job.settings(), pool.model_dump(mode="json", exclude={"source"}))
    if (done := _done(job, identity)) is not None:
        remove_folder(job.work)
        return done
    _forget_finished(job)
    job = stored(job, pool)
    search = _in_shards if scope == "shard" else _in_pool
    found = search(session, job, pool, resources, show)
    kinds = [near.kind for near in by]
    names = {kind: sorted(f"{name}.parquet" for name in found if name.startswith(f"{kind}-")) for kind in kinds}
    pairs = PairFiles(where=job.out / pair_files.FOLDER, num_rows=pool.num_rows, files=names)
    if job.vector and scope == "pool" and lists.num_lists(pool.num_rows) > 1:
        pairs = pairs.model_copy(update={"recall": _recall(job, pool, pairs)})
    record = {"identity": identity, **pairs.model_dump(mode="json", exclude={"where"})}
    write_json(job.out / pair_files.FOLDER / DONE, record)
    remove_folder(job.work)
    return pairs


def _in_shards(session: Session, job: Search, pool: Pool, resources: Resources, show: Progress) -> list[str]:
    names = {shard.name: shard.name for shard in pool.shards if shard.rows}
    run_stage(session, ShardJob(**job.model_dump()), names, resources, show, "near pairs")
    return [f"{near.kind}-{name}" for near in job.by for name in names]


def _in_pool(session: Session, job: Search, pool: Pool, resources: Resources, show: Progress) -> list[str]:
    job = prepare(session, job, pool, resources, show)
    planned = plan_units(job, pool)
    write_json(job.work / "units.json", planned)
    join = JoinJob(**job.model_dump(), units=sha256_file(job.work / "units.json"))
    run_stage(session, join, {name: name for name in planned}, resources, show, "near pairs")
    return list(planned)


def plan_units(job: Search, pool: Pool) -> dict[str, Unit]:
    """The units of work of all kinds by their names, from how many records each key has."""
    planned = {}
    for near in job.by:
        counts = sum(np.diff(segments.Segment(job.path(near, block)).edges) for block in pool.blocks)
        for number, unit in enumerate(units.plan(np.asarray(counts), near)):
            planned[f"{near.kind}-{number:05d}"] = unit
    return planned


def _recall(job: Search, pool: Pool, found: PairFiles) -> Recall:
    exact = [pairs for block in pool.blocks for pairs in pair_files.read(job.exact_path(block))]
    return estimate(len(Lists.load(job.work / LISTS).queries), Pairs.concat(exact), lambda: found.of("vector"))


def _done(job: Search, identity: str) -> PairFiles | None:
    """The pairs of the same search, if all files of them are there."""
    folder = job.out / pair_files.FOLDER
    if not (folder / DONE).is_file():
        return None
    record = documents.read_json(folder / DONE, documents.PLAN_BYTES)
    if record.pop("identity", None) != identity:
        return None
    pairs, there = validate(PairFiles, {"where": folder, **record}, folder / DONE), listing(folder)
    # The record has its kinds sorted by name.
    pairs = pairs.model_copy(update={"files": {near.kind: pairs.files[near.kind] for near in job.by}})
    return pairs if all(name in there for names in pairs.files.values() for name in names) else None


def _forget_finished(job: Search) -> None:
    """Have the blocks written again if a finished search has removed them."""
    remove_file(job.out / pair_files.FOLDER / DONE)
    if not (job.work / "pool.json").is_file():
        for stage in (ListsJob, SplitJob):
            ledger = Ledger(job.out, stage(**job.model_dump()).name)
            for name in ledger.recorded_shards():
                ledger.invalidate(name)
