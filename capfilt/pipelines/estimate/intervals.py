"""95 % intervals of shares and of totals, from a sample of pictures that may be clustered by shard.

Texts of one picture are kept or dropped together, and pictures of one shard are alike (one site, one day). Wilson's
interval for as many independent texts as there are would be too narrow, so it is taken with the number of independent
texts that gives the variance which was observed between clusters (Kish's effective size).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from capfilt.data.labels import wilson_interval

_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
_Z = 1.959964


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, within 0.1 % (Cornish and Fisher's expansion; a table where that is bad)."""
    if freedom in _T:
        return _T[freedom]
    z = _Z
    near = (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return z + near + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)


@dataclass(frozen=True)
class Figure:
    """An estimate with its 95 % interval; without one where a single measurement says nothing of its spread."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, value: float, relative: float | None) -> Figure:
        """With an interval of so much to either side, as a part of the value."""
        if relative is None:
            return cls(value)
        return cls(value, value * max(0.0, 1 - relative), value * (1 + relative))

    @classmethod
    def exact(cls, value: float) -> Figure:
        """What is known."""
        return cls(value, value, value)

    @property
    def rest(self) -> Figure:
        """Of a share, what it leaves."""
        return self._ends(lambda x: 1 - x)

    @property
    def inverse(self) -> Figure:
        """One by it; without an interval where that would have no end."""
        return self._ends(lambda x: 1 / x) if self.low else Figure(1 / self.value)

    def _ends(self, falling: Callable[[float], float]) -> Figure:
        if self.low is None or self.high is None:
            return Figure(falling(self.value))
        return Figure(falling(self.value), falling(self.high), falling(self.low))

    def plus(self, other: Figure) -> Figure:
        """The sum with another, which may be wrong in the same direction."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return Figure(self.value + other.value)
        return Figure(self.value + other.value, self.low + other.low, self.high + other.high)

    @property
    def relative(self) -> float | None:
        """Half of the interval, as a part of the value."""
        if self.low is None or self.high is None or not self.value:
            return None
        return (self.high - self.low) / 2 / self.value

    def times(self, *others: Figure) -> Figure:
        """The product with others that vary independently."""
        every = (self, *others)
        value = math.prod(one.value for one in every)
        parts = [one.relative for one in every]
        known = [part for part in parts if part is not None]
        return Figure.of(value, math.hypot(*known) if len(known) == len(parts) else None)

    def record(self) -> dict[str, float]:
        """For JSON; what is not known is absent."""
        named = {"value": self.value, "low": self.low, "high": self.high}
        return {name: float(f"{each:.5g}") for name, each in named.items() if each is not None}


def share(rows: Iterable[tuple[object, int, int]], drawn: float = 0.0) -> Figure | None:
    """A share of a population with its interval; None where nothing was counted.

    Args:
        rows: of each drawn picture its cluster, and how many of how many of its texts count (1 of 1 for itself).
        drawn: the part of the population that was drawn: what all of it is, is known without an interval.
    """
    hits: dict[object, int] = defaultdict(int)
    totals: dict[object, int] = defaultdict(int)
    pictures = 0
    for cluster, count, total in rows:
        hits[cluster] += count
        totals[cluster] += total
        pictures += total > 0
    total = sum(totals.values())
    if not total:
        return None
    p, clusters = sum(hits.values()) / total, len(totals)
    if drawn >= 1:
        return Figure(p, p, p)
    size = float(pictures)
    z = t_quantile(clusters - 1) if clusters > 1 else _Z
    if 0 < p < 1 and clusters > 1:
        between = sum((hits[name] - p * totals[name]) ** 2 for name in totals) * clusters / (clusters - 1)
        # No more independent ones than texts, however even the clusters came out.
        size = min(float(total), p * (1 - p) * total**2 / between) if between else float(total)
    return Figure(p, *wilson_interval(p * size / (1 - drawn), size / (1 - drawn), z))


def ratio(rows: Sequence[tuple[float, float]]) -> Figure:
    """The sum of the first by the sum of the second, such as seconds by images, from independent pieces."""
    below = sum(count for _, count in rows)
    value = sum(amount for amount, _ in rows) / below
    if len(rows) < 2 or not value:
        return Figure(value)
    squares = sum((amount - value * count) ** 2 for amount, count in rows) * len(rows) / (len(rows) - 1)
    return Figure.of(value, t_quantile(len(rows) - 1) * math.sqrt(squares) / below / value)


def records(figures: dict[str, Figure | None]) -> dict[str, Any]:
    """Those that there are, for JSON."""
    return {name: figure.record() for name, figure in figures.items() if figure is not None}
