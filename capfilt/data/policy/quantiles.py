"""Quantiles of scores over all shards, in one pass and bounded memory: values are counted in 2^20 bins.

The bins lie between powers of two, so that their edges are exact numbers: a threshold is exact to 2^-19 for a score in
[-1, 1] (2 x 10^-6), and to 2^-18 of its range for one without bounds, whose range is found in a pass before.
"""

from __future__ import annotations

import math

import numpy as np

BINS = 1 << 20


class Histogram:
    """The values of a score, counted."""

    def __init__(self, low: float = -1.0, high: float = 1.0):
        """`low`, `high`: the range in which every value lies; rounded outwards to multiples of a power of two."""
        step = 2.0 ** math.ceil(math.log2(high - low)) if high > low else 1.0
        self.low = math.floor(low / step * 2) * step / 2
        self.width = step if high - self.low <= step else 2 * step
        self.counts = np.zeros(BINS, np.int64)

    def add(self, values: np.ndarray) -> None:
        bins = ((values.astype(np.float64) - self.low) / self.width * BINS).astype(np.int64)
        used, counts = np.unique(np.clip(bins, 0, BINS - 1), return_counts=True)  # not bincount: 8 MB for each shard
        self.counts[used] += counts

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def threshold(self, share: float) -> float:
        """The highest bin edge that this share of the values reach, one value at least; equal values are one."""
        from_top = np.cumsum(self.counts[::-1])
        wanted = int(np.searchsorted(from_top, max(1, round(share * self.total))))
        return float((BINS - 1 - wanted) / BINS * self.width + self.low)

    def knots(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """At most `number` values, ascending, and the share of all that lies below each."""
        below = np.cumsum(self.counts) - self.counts
        used = np.searchsorted(np.cumsum(self.counts), np.linspace(1, self.total, number), side="left")
        bins = np.unique(used)
        return bins / BINS * self.width + self.low, below[bins] / self.total
