"""The numbers that a policy comes to over all annotations of a run: found once, by all workers, and kept.

A share of all texts takes a pass over the scores of every shard. Its result lies in `ledger/select.rule.json`, with a
fingerprint of the policy and the annotations, so that a rerun of what is done does not repeat it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import ClassVar

import numpy as np

from capfilt import config as configs
from capfilt.cluster.session import Session
from capfilt.cluster.worker_pool import Resources, run_items
from capfilt.config import Config
from capfilt.data import duplicates, scores
from capfilt.data.policy import FILTER_SCORES, FUSED, PolicyConfig, Pool, Resolved, Rule, resolve
from capfilt.data.policy.config import Term
from capfilt.data.policy.quantiles import Histogram
from capfilt.errors import RunError
from capfilt.runs.ledger import Ledger, fingerprint
from capfilt.runs.progress import Progress
from capfilt.stages.select import annotations_sha256, score_sha256
from capfilt.storage import documents
from capfilt.storage.atomic import write_json
from capfilt.storage.paths import StoragePath, listing

RULE = "select.rule.json"
BLOCK = 500
"""Shards that a worker counts at a time."""


class CountScores(Config):
    """Counts the values of a score in blocks of shards; an item is their names with "/" between them."""

    name: ClassVar[str] = "count-scores"  # of its workers

    annotations: StoragePath
    sources: tuple[str, ...]
    without: StoragePath | None
    score: str
    terms: tuple[Term, ...]
    of: str
    range: tuple[float, float]

    def open(self) -> Callable[[str], tuple[np.ndarray, np.ndarray]]:
        """Nothing to load."""
        return self.count

    def count(self, block: str) -> tuple[np.ndarray, np.ndarray]:
        """The bins that have values, [n], and how many, [n]."""
        histogram = Histogram(*self.range)
        pool = Pool(self.annotations, block.split("/"), self.sources, self.without)
        for values in pool.values(self.score, self.terms, self.of):
            histogram.add(values)
        bins = np.flatnonzero(histogram.counts)
        return bins, histogram.counts[bins]


def resolve_once(
    session: Session,
    policy: PolicyConfig,
    pool: Pool,
    calibrated: float | None,
    out: StoragePath,
    resources: Resources,
    show: Progress,
) -> Resolved:
    """As `resolve`, with what took a pass over all scores kept in the run folder `out`.

    Raises:
        DataError: as `resolve`; the table of a further score is missing.
        RunError: a block of shards cannot be counted.
    """
    if calibrated is not None or (policy.threshold != "keep-rate" and not policy.fused):
        return resolve(policy, pool, calibrated)
    with show.wait(f"reading the scores of {len(pool.shards):,} shards"):
        wanted, kept = fingerprint(policy.record(), _content(policy, pool)), read_rule(out)
        if kept is not None and kept[0] == wanted:
            return kept[1]
        spread = not session.local and len(pool.shards) > 2 * BLOCK
        resolved = None if spread else resolve(policy, pool, calibrated)
    if resolved is None:
        count = partial(_count_on_workers, session, resources, show)
        resolved = resolve(policy, pool, calibrated, count)
    record = {"of": wanted, "rule": resolved.rule.model_dump(mode="json"), "pool": resolved.pool}
    write_json(out / "ledger" / RULE, record)
    return resolved


def _count_on_workers(
    session: Session,
    resources: Resources,
    show: Progress,
    pool: Pool,
    score: str,
    terms: Sequence[Term],
    of: str,
    ends: tuple[float, float],
) -> Histogram:
    """The values of a score over a pool, counted by workers."""
    shards, annotations, without = pool.shards, pool.annotations.absolute(), pool.without and pool.without.absolute()
    counted = {"annotations": annotations, "sources": tuple(pool.sources), "without": without}
    job = CountScores(**counted, score=score, terms=tuple(terms), of=of, range=ends)
    blocks = ["/".join(shards[first : first + BLOCK]) for first in range(0, len(shards), BLOCK)]
    histogram = Histogram(*ends)
    with show.stage("scores", len(blocks), "blocks of shards") as line:
        for done, end in enumerate(run_items(session, job, blocks, resources), 1):
            if end.result is None:
                raise RunError(f"the scores of some of {BLOCK} shards could not be counted: {end.error}")
            bins, counts = end.result
            histogram.counts[bins] += counts
            line.update(done)
    return histogram


def read_rule(out: StoragePath) -> tuple[str, Resolved] | None:
    """What `resolve_once` kept in a run folder: of which policy and annotations, and the numbers; None for none."""
    path = out / "ledger" / RULE
    if not path.is_file():
        return None
    record = documents.read_object(path)
    pool = record.get("pool")
    if not isinstance(pool, dict):
        raise RunError(f"{path} does not say what a policy came to; remove it, and it is found again.")
    return str(record.get("of")), Resolved(configs.validate(Rule, record.get("rule"), path), pool)


def _content(policy: PolicyConfig, pool: Pool) -> str:
    """A hash of all that a policy reads."""
    annotations, shards, digest = pool.annotations, pool.shards, hashlib.sha256()
    home = annotations.parent
    known = _digests(Ledger(home, "annotate"), annotations)
    for shard in shards:
        digest.update(f"{shard} {known.get(shard) or annotations_sha256(annotations, shard)}\n".encode())
    for score in (score for score in policy.used_scores if score not in (*FILTER_SCORES, FUSED)):
        known = _digests(Ledger(home, f"score-{score}"), home / scores.FOLDER / score)
        for shard in shards:
            digest.update(f"{shard} {known.get(shard) or score_sha256(home, score, shard)}\n".encode())
    if pool.without is not None:
        for shard in shards:
            digest.update(f"{shard} {duplicates.content(pool.without, shard)}\n".encode())
    return digest.hexdigest()


def _digests(ledger: Ledger, folder: StoragePath) -> Mapping[str, str]:
    """The sha256 of the tables in a folder that have the size that was committed, by shard."""
    files, known = listing(folder), dict[str, str]()
    for done in ledger.readable_completions():
        for output in done.outputs:
            file = files.get(f"{done.shard}.parquet")
            if output.path.endswith(f"/{done.shard}.parquet") and file is not None and file.st_size == output.bytes:
                known[done.shard] = output.sha256
    return known
