"""95 % intervals of shares and of totals, from a sample of pictures that may be clustered by shard.

Texts of one picture are kept or dropped together, and pictures of one shard are alike (one site, one day). Wilson's
interval for as many independent texts as there are would be too narrow, so it is taken with the number of independent
texts that gives the variance which was observed between clusters (Kish's effective size).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from capfilt.data.labels import wilson_interval

_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
_Z = 1.959964


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t within 0.2 % (Cornish and Fisher's expansion; a table where that is bad)."""
    if freedom in _T:
        return _T[freedom]
    z = _Z
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))


@dataclass(frozen=True)
class Figure:
    """An estimate with its 95 % interval; NaN where a single measurement says nothing of its spread."""

    value: float
    low: float = math.nan
    high: float = math.nan

    @classmethod
    def of(cls, value: float, relative: float = 0.0) -> Figure:
        """With an interval of so much to either side, as a part of the value; without: it is known."""
        return cls(value, value * max(1 - relative, 0.0), value * (1 + relative))  # in this order NaN stays NaN

    def __mul__(self, other: Figure | float) -> Figure:
        """The product with what varies independently, or is known."""
        if not isinstance(other, Figure):
            return Figure(self.value * other, self.low * other, self.high * other)
        spread = [(one.high - one.low) / 2 / one.value if one.value else 0.0 for one in (self, other)]
        return Figure.of(self.value * other.value, math.hypot(*spread))

    def __add__(self, other: Figure | float) -> Figure:
        """The sum with what is known, or may be wrong in the same direction."""
        more = other if isinstance(other, Figure) else Figure.of(other)
        return Figure(self.value + more.value, self.low + more.low, self.high + more.high)

    def falling(self, function: Callable[[float], float]) -> Figure:
        """A function of it that falls, such as what a share leaves."""
        return Figure(function(self.value), function(self.high), function(self.low))


def records(figures: Mapping[str, Figure | None]) -> dict[str, dict[str, float]]:
    """For JSON: `value`, `low` and `high` of each; what is not known is absent."""
    named = {name: vars(figure) for name, figure in figures.items() if figure is not None}
    return {name: {k: float(f"{x:.5g}") for k, x in each.items() if math.isfinite(x)} for name, each in named.items()}


def share(rows: Iterable[tuple[object, int, int]], drawn: float = 0.0) -> Figure | None:
    """A share of a population with its interval; None where nothing was counted.

    Args:
        rows: of each drawn picture its cluster, and how many of how many of its texts count (1 of 1 for itself).
        drawn: the part of the population that was drawn: what all of it is, is known without an interval.
    """
    clusters: dict[object, tuple[int, int]] = {}
    pictures = 0
    for cluster, count, of in rows:
        hits, total = clusters.get(cluster, (0, 0))
        clusters[cluster] = (hits + count, total + of)
        pictures += of > 0
    total = sum(of for _, of in clusters.values())
    if not total:
        return None
    p, num = sum(hits for hits, _ in clusters.values()) / total, len(clusters)
    if drawn >= 1:
        return Figure.of(p)
    between = sum((hits - p * of) ** 2 for hits, of in clusters.values()) * num / max(1, num - 1)
    # Where none or all count, nothing varies between clusters; a picture's texts then count as one.
    size = float(pictures) if not between else min(total, p * (1 - p) * total**2 / between)
    size /= 1 - drawn
    return Figure(p, *wilson_interval(p * size, size, t_quantile(num - 1) if num > 1 else _Z))


def ratio(rows: Sequence[tuple[float, float]]) -> Figure:
    """The sum of the first by the sum of the second, such as seconds by images, from independent pieces."""
    below = sum(count for _, count in rows)
    value = sum(amount for amount, _ in rows) / below
    if len(rows) < 2 or not value:
        return Figure(value)
    squares = sum((amount - value * count) ** 2 for amount, count in rows) * len(rows) / (len(rows) - 1)
    return Figure.of(value, t_quantile(len(rows) - 1) * math.sqrt(squares) / below / value)
