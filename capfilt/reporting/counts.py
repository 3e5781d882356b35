"""Counts over all annotations of a round: texts and images, histograms of scores, lengths, verdicts.

Shards are added one by one and nothing of a text is kept, so memory does not grow with the run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from capfilt.data.policy import failure_class
from capfilt.data.sample import SOURCES
from capfilt.evaluation.known_truth import Truth
from capfilt.printable import printable
from capfilt.reporting.charts import Histogram
from capfilt.reporting.page_data import MAX_WORDS, AnnotationCounts
from capfilt.runs.tally import MAX_REASONS, NO_TEXT_REASONS, OTHER, Tally

NUM_BINS = 1_000
"""Bins of a score while counting; a histogram has about NUM_BINS / 20 over the range that occurs."""
LAYERS = ("wrong", "right", "unknown")
"""What is known of a text's truth."""
SCORE_RANGES = {"itm": (0.0, 1.0), "itc": (-1.0, 1.0)}


class RoundCounts:
    """The counts of one round so far."""

    def __init__(self, ranges: Mapping[str, tuple[float, float]] = SCORE_RANGES) -> None:
        """`ranges`: the scores to count, by name, with the least and the greatest value of each."""
        self.ranges = ranges
        self.scores = {
            (score, source): {layer: np.zeros(NUM_BINS, np.int64) for layer in LAYERS}
            for score in ranges
            for source in SOURCES
        }
        self.lengths = {source: np.zeros(MAX_WORDS + 1, np.int64) for source in SOURCES}
        self.totals = dict.fromkeys(SOURCES, 0)
        """Texts that contain anything to read, by source."""
        self.images = self.kept_images = 0
        self.failed = Counter[str]()
        self.kept = Counter[str]()
        self.dropped = Counter[str]()

    def add(self, table: pa.Table, whys: Sequence[str], truths: Mapping[str, Truth]) -> None:
        """Count the annotations of one shard; `whys` is why each row is dropped ("" = kept), `truths` what is known of
        web texts by uid."""
        is_ok = pc.equal(table.column("status"), "ok")
        self._count_verdicts(table.append_column("why", pa.array(list(whys), pa.string())), is_ok)
        ok = table.filter(pc.and_(is_ok, pc.invert(pc.match_substring_regex(table.column("reason"), NO_TEXT_REASONS))))
        sources = ok.column("source").to_numpy()
        num_words = _num_words(ok.column("text"))
        for source in SOURCES:
            mask = sources == source
            self.totals[source] += int(mask.sum())
            self.lengths[source] += np.bincount(np.minimum(num_words[mask], MAX_WORDS), minlength=MAX_WORDS + 1)
        layer = _layers(ok, truths)
        for (score, source), counts in self.scores.items():
            values = ok.column(score).to_numpy().astype(np.float64)
            scored = (sources == source) & ~np.isnan(values)
            low, high = self.ranges[score]
            bins = np.clip(((values[scored] - low) / (high - low) * NUM_BINS).astype(int), 0, NUM_BINS - 1)
            for number, name in enumerate(LAYERS):
                counts[name] += np.bincount(bins[layer[scored] == number], minlength=NUM_BINS)

    def _count_verdicts(self, table: pa.Table, is_ok: pa.ChunkedArray) -> None:
        ok = table.filter(is_ok)
        kept = ok.filter(pc.equal(ok.column("why"), ""))
        dropped = ok.filter(pc.not_equal(ok.column("why"), ""))
        reasons = pc.binary_join_element_wise(dropped.column("source"), dropped.column("why"), ": ")
        self.images += pc.count_distinct(ok.column("key")).as_py()
        self.kept_images += pc.count_distinct(kept.column("key")).as_py()
        self.kept += Counter(_value_counts(kept.column("source")))
        _count_reasons(self.dropped, _value_counts(reasons))
        failures = _value_counts(table.filter(pc.invert(is_ok)).column("reason"))
        for reason, count in failures.items():
            _count_reasons(self.failed, {failure_class(reason): count})

    def histograms(self) -> dict[str, dict[str, Histogram]]:
        """By score and source, over the range of scores that occur."""
        histograms: dict[str, dict[str, Histogram]] = {}
        for score, (low, high) in self.ranges.items():
            by_source = {source: self.scores[score, source] for source in SOURCES}
            used = np.flatnonzero(sum(counts for layers in by_source.values() for counts in layers.values()))
            if not used.size:
                continue
            # Rounded outwards to twentieths of the scale, so that all bins are equal and their edges round numbers.
            step = NUM_BINS // 20
            start, end = used[0] // step * step, -(-(used[-1] + 1) // step) * step
            merged = max(1, (end - start) // 50)
            first, last = (low + (high - low) * int(edge) / NUM_BINS for edge in (start, end))
            histograms[score] = {
                source: Histogram(first, last, _merge_bins(layers, slice(start, end), merged))
                for source, layers in by_source.items()
                if self.totals[source]
            }
        return histograms

    def median(self, score: str, source: str | None = None) -> float | None:
        """The median of a score to 1/NUM_BINS of its range, of one source's texts or of all; None without a score."""
        sources = SOURCES if source is None else (source,)
        counts = sum(self.scores[score, each][layer] for each in sources for layer in LAYERS)
        total = int(np.sum(counts))
        if not total:
            return None
        low, high = self.ranges[score]
        position = int(np.searchsorted(np.cumsum(counts), (total + 1) // 2))
        return low + (high - low) * (position + 0.5) / NUM_BINS

    def auc(self, score: str) -> float | None:
        """The chance that a right web text outscores a wrong one, where the truth is known; to about 1/NUM_BINS."""
        right, wrong = (self.scores[score, "web"][layer].astype(np.float64) for layer in ("right", "wrong"))
        if not right.sum() or not wrong.sum():
            return None
        below = np.cumsum(wrong) - wrong
        return float((right * (below + wrong / 2)).sum() / (right.sum() * wrong.sum()))

    def result(self, recorded: Tally | None = None) -> AnnotationCounts:
        """The counts, as the page shows them; those of outcomes from the ledger's record of all shards, where given."""
        if recorded is None:
            read, kept_images = self.images, self.kept_images
            failed, kept, dropped = self.failed, self.kept, self.dropped
            texts = {source: count for source, count in self.totals.items() if count}
        else:
            read, kept_images = recorded.samples["kept"] + recorded.samples["dropped"], recorded.samples["kept"]
            failed, texts = recorded.failed, recorded.num_scored()
            kept, dropped = recorded.texts["kept"], recorded.texts["dropped"]
        medians = {score: {source: self.median(score, source) for source in SOURCES} for score in self.ranges}
        return AnnotationCounts(
            images=read,
            failed=dict(failed),
            texts=texts,
            kept_images=kept_images,
            kept=dict(kept),
            dropped=dict(dropped),
            medians={
                score: {source: value for source, value in by_source.items() if value is not None}
                for score, by_source in medians.items()
            },
            auc={score: area for score in self.ranges if (area := self.auc(score)) is not None},
        )


def _value_counts(column: pa.ChunkedArray) -> dict[str, int]:
    return {each["values"]: each["counts"] for each in pc.value_counts(column).to_pylist()}


def _count_reasons(into: Counter[str], counts: Mapping[str, int]) -> None:
    """Add counts by reason; the rarer ones of too many are counted as one."""
    for reason, count in sorted(counts.items(), key=lambda item: -item[1]):
        name = printable(reason)
        into[name if name in into or len(into) < MAX_REASONS else OTHER] += count


def _num_words(texts: pa.ChunkedArray) -> np.ndarray:
    trimmed = pc.utf8_trim_whitespace(texts)
    parts = pc.list_value_length(pc.utf8_split_whitespace(trimmed)).to_numpy()
    return np.where(pc.equal(trimmed, "").to_numpy(), 0, parts)  # "" splits into one part


def _layers(table: pa.Table, truths: Mapping[str, Truth]) -> np.ndarray:
    """The position in LAYERS of each row; only the first web text of an image may have a known truth."""
    unknown = LAYERS.index("unknown")
    if not truths:
        return np.full(table.num_rows, unknown)
    is_web = table.column("source").to_numpy() == "web"
    is_first = table.column("candidate").to_numpy() == 0
    known = (
        truths.get(uid) if first and web else None
        for uid, first, web in zip(table.column("uid").to_pylist(), is_first, is_web, strict=True)
    )
    return np.array([unknown if truth is None else int(truth[0]) for truth in known], dtype=int)


def _merge_bins(layers: Mapping[str, np.ndarray], part: slice, size: int) -> dict[str, list[int]]:
    merged = {
        name: np.add.reduceat(counts[part], np.arange(0, part.stop - part.start, size))
        for name, counts in layers.items()
    }
    return {name: counts.tolist() for name, counts in merged.items() if counts.any()}
