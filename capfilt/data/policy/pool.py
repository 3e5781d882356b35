"""The pool: what a share is a share of, and what the scores of a fused one are normalised over.

It is read shard after shard in bounded memory, and of each shard the columns alone that are needed. With the scores'
ranges known one pass finds a threshold; a fused score takes two more before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

import capfilt.data.annotations as tables
from capfilt.data import scores as score_tables
from capfilt.data.duplicates import Copies
from capfilt.data.policy.config import FILTER_SCORES, FUSED, PolicyConfig, Rule, Term, range_of
from capfilt.data.policy.quantiles import Histogram
from capfilt.data.sample import SOURCES
from capfilt.errors import DataError
from capfilt.storage.paths import StoragePath, map_concurrent
from capfilt.storage.remote_path import RemotePath

RANKS = 1_025
"""Points of the line that turns a score into its rank."""


@dataclass(frozen=True)
class Pool:
    """The annotations of some shards, of which a policy considers some sources."""

    annotations: StoragePath
    """The folder of annotations/; `scores/` lies beside it."""
    shards: Sequence[str]
    sources: Sequence[str] = ()
    """() = all."""
    without: StoragePath | None = None
    """The run folder of a deduplication, whose copies are not in the pool."""

    def columns(self, scores: Sequence[str], terms: Sequence[Term] = (), of: str = "texts") -> Iterator[pa.Table]:
        """Each shard's texts with these scores, and `fused` where there are terms; of "web": those alone that came with
        an image; of "images": with the key of their image."""
        sources = [each for each in self.sources or SOURCES if not (of == "web" and each == "synthetic")]
        names = [name for name in scores if name in FILTER_SCORES]
        names += ["source"] if len(sources) < len(SOURCES) else []
        names += ["key"] if of == "images" or self.without is not None else []
        names += ["uid"] if self.without is not None else []

        def read(shard: str) -> pa.Table:
            table = tables.read(self.annotations / f"{shard}.parquet", only=names or ["candidate"])
            table = score_tables.join(table, self.annotations.parent, shard, scores)
            return table if self.without is None else _without(table, Copies.load(self.without, shard))

        for table in map_concurrent(read, self.shards, isinstance(self.annotations, RemotePath)):
            if "source" in names:
                table = table.filter(pc.is_in(table["source"], pa.array(sources)))
            yield append_fused(table, terms)

    def values(self, score: str, terms: Sequence[Term], of: str) -> Iterator[np.ndarray]:
        """The values that are counted, shard after shard: of all texts, of those that came with the images (`web`), or
        the best of each image (`images`)."""
        parts = [term.score for term in terms] if score == FUSED else [score]
        for table in self.columns(parts, terms if score == FUSED else (), of):
            table = table.filter(pc.is_valid(table[score]))
            values = table[score].to_numpy().astype(np.float64)
            if of == "images" and len(values):  # the rows of an image are adjacent
                keys = table["key"].combine_chunks()
                first = np.flatnonzero(
                    np.append(True, pc.not_equal(keys[1:], keys[:-1]).to_numpy(zero_copy_only=False))
                )
                values = np.maximum.reduceat(values, first)
            yield values


def _without(table: pa.Table, copies: Copies) -> pa.Table:
    """The texts of a shard but for those of copies."""
    images = pc.binary_join_element_wise(table["key"], table["uid"], "\0")
    gone = pa.array(["\0".join(image) for image in copies.reasons], pa.string())
    return table.filter(pc.invert(pc.is_in(images, gone)))


@dataclass(frozen=True)
class Resolved:
    """A policy with its numbers, and what they were taken of."""

    rule: Rule
    pool: dict[str, Any] = field(default_factory=dict)
    """For the record of the run; {} for a policy that needs no more than one threshold in its range."""


Count = Callable[["Pool", str, Sequence[Term], str, tuple[float, float]], Histogram]
"""Counts the values of a score over a pool: which score, its terms, of what, and its range."""


def count_values(pool: Pool, score: str, terms: Sequence[Term], of: str, range: tuple[float, float]) -> Histogram:
    """Count them in this process."""
    histogram = Histogram(*range)
    for values in pool.values(score, terms, of):
        histogram.add(values)
    return histogram


def resolve(policy: PolicyConfig, pool: Pool, calibrated: float | None, count: Count = count_values) -> Resolved:
    """The rule that a policy comes to over a pool of its sources; `calibrated` is the result of a calibration,
    whatever the policy says of its threshold. `count` counts the scores. DataError for a share of nothing, or scores
    that are not there."""
    terms = fuse(policy, pool) if policy.fused else ()
    record: dict[str, Any] = {"fused": [term.model_dump(mode="json") for term in terms]} if terms else {}
    if policy.threshold != "keep-rate" or calibrated is not None:
        assert policy.threshold != "calibrated" or calibrated is not None, (
            "a calibrated policy needs a calibration first"
        )
        number = calibrated if isinstance(policy.threshold, str) else policy.threshold
        return Resolved(policy.rule(number, terms), record)
    ends = score_range(policy.score, pool, terms)
    histogram = count(pool, policy.score, terms, policy.keep_rate_of, ends)
    if not histogram.total:
        raise DataError("no text has a score, so no share of them can be kept; annotate first")
    share = policy.keep_rate if not policy.samples_seen else share_for(policy, histogram.total)
    threshold = histogram.threshold(share)
    if policy.samples_seen or policy.keep_rate_of != "texts" or terms:
        record = {
            "of": policy.keep_rate_of,
            "size": histogram.total,
            "keep_rate": share,
            "threshold": threshold,
            **record,
        }
    if policy.samples_seen:
        record |= {"samples_seen": policy.samples_seen, "repeats": policy.samples_seen / (share * histogram.total)}
    return Resolved(policy.rule(threshold, terms), record)


def share_for(policy: PolicyConfig, size: int) -> float:
    """The share of a pool of this size with which a training of `samples_seen` samples sees none more than
    `max_repeats` times on average; at most 1.

    Repeats lose their worth slowly at first: four epochs are almost as good as new data, sixteen are worth little more
    (Muennighoff et al., arXiv 2305.16264, on language). For CLIP, a strict filter wins while its texts are fresh and
    loses to a looser one after they were repeated (Goyal et al., arXiv 2404.07177). So: the strictest share that keeps
    the repeats allowed.
    """
    return min(1.0, policy.samples_seen / (policy.max_repeats * size))


def score_range(score: str, pool: Pool, terms: Sequence[Term]) -> tuple[float, float]:
    """The range in which every value of a score lies: known, or found in a pass."""
    if score == FUSED:
        ends = [sorted((term.weight * term.to[0], term.weight * term.to[-1])) for term in terms]
        least, most = (np.float32(math.fsum(end)) for end in zip(*ends, strict=True))
        return float(np.nextafter(least, np.float32(-np.inf))), float(np.nextafter(most, np.float32(np.inf)))
    low, high = range_of(score)
    if math.isfinite(low):
        return (-1.0, 1.0) if score == "itm" else (low, high)  # as the thresholds of older runs
    moments = Moments()
    for values in pool.values(score, (), "texts"):
        moments.add(values)
    return moments.low, moments.high


# ---- fused ----


@dataclass
class Moments:
    """The range, the mean and the variance of values, added a shard at a time (Chan et al. 1983)."""

    number: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """The sum of squared distances from the mean."""
    low: float = math.inf
    high: float = -math.inf

    def add(self, values: np.ndarray) -> None:
        if not len(values):
            return
        mean, total = float(values.mean()), self.number + len(values)
        distance = mean - self.mean
        self.squares += float(((values - mean) ** 2).sum()) + distance**2 * self.number * len(values) / total
        self.mean += distance * len(values) / total
        self.number = total
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))


def fuse(policy: PolicyConfig, pool: Pool) -> tuple[Term, ...]:
    """The terms of a policy's fused score, normalised over the texts of the pool that have all of its scores."""
    names = list(policy.fused)
    moments = {name: Moments() for name in names}
    for complete in _complete(pool, names):
        for name in names:
            moments[name].add(complete[name])
    if not moments[names[0]].number:
        raise DataError(f"no text has all of {', '.join(names)}, so no fused score: add them, or give other scores.")
    histograms: dict[str, Histogram] = {}
    if policy.normalise == "rank":
        histograms = {name: Histogram(one.low, one.high) for name, one in moments.items()}
        for complete in _complete(pool, names):
            for name in names:
                histograms[name].add(complete[name])
    lines = {name: _line(policy.normalise, one, histograms.get(name)) for name, one in moments.items()}
    return tuple(Term(score=name, weight=policy.fused[name], at=at, to=to) for name, (at, to) in lines.items())


def _complete(pool: Pool, names: Sequence[str]) -> Iterator[Mapping[str, np.ndarray]]:
    """Of each shard the values of these scores, of the texts that have all of them."""
    for table in pool.columns(names):
        whole = table.select(names).drop_null()
        yield {name: whole[name].to_numpy().astype(np.float64) for name in names}


Line = tuple[tuple[float, ...], tuple[float, ...]]


def _line(kind: str, values: Moments, histogram: Histogram | None) -> Line:
    """The line of a normalisation, by the share of values below where there is a histogram, else by range or moments;
    of a score that is the same everywhere, zero."""
    if values.high == values.low:
        return (values.low,), (0.0,)
    if histogram is not None:
        at, to = histogram.knots(RANKS)
        return (*at.tolist(), values.high), (*to.tolist(), 1.0)
    deviation = math.sqrt(values.squares / values.number)
    shift, scale = (values.mean, deviation) if kind == "z-score" else (values.low, values.high - values.low)
    return (values.low, values.high), ((values.low - shift) / scale, (values.high - shift) / scale)


def append_fused(table: pa.Table, terms: Sequence[Term]) -> pa.Table:
    """A table with the weighted sum of its normalised scores as the column `fused`; null where one of them is."""
    if not terms:
        return table
    total = np.zeros(table.num_rows)
    for term in terms:
        values = table[term.score].to_numpy().astype(np.float64)  # null becomes NaN
        total += term.weight * np.interp(values, term.at, term.to)
    return table.append_column(pa.field(FUSED, pa.float32()), pa.array(total, pa.float32(), from_pandas=True))


def with_scores(table: pa.Table, annotations: StoragePath, shard: str, rule: Rule) -> pa.Table:
    """A shard's annotations with the further scores that a rule reads; the same table for a rule by itm and itc."""
    added = [name for name in rule.further_scores if name != FUSED]
    table = score_tables.join(table, annotations.parent, shard, added)
    return append_fused(table, rule.fused)
