"""The recall of a search through lists, estimated on queries whose neighbours were searched exactly.

Each pair within the radius of a query counts once; a pair counts as found if the rows that stand for its two values
were found near.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from capfilt.config import Config
from capfilt.index.hamming import Pairs


class Recall(Config):
    """What an exact search of some rows found, and how much of it the lists did."""

    queries: int
    neighbours: int
    """Pairs of a query and another row within the radius."""
    found: int
    """Of these, by the lists."""

    @property
    def value(self) -> float | None:
        """In [0, 1]; None where no query has a neighbour."""
        return self.found / self.neighbours if self.neighbours else None


def estimate(num_queries: int, exact: Pairs, found: Callable[[], Iterable[Pairs]]) -> Recall:
    """Compare the exact pairs of queries with those that were found, which are read twice."""
    ends = np.unique(np.concatenate([exact.a, exact.b]))
    hubs = ends.copy()  # the rows that stand for them
    for a, b, distance in found():
        equal = (distance == 0) & np.isin(b, ends)
        hubs[np.searchsorted(ends, b[equal])] = a[equal]
    one, other = (hubs[np.searchsorted(ends, side)] for side in (exact.a, exact.b))
    wanted = _key(np.minimum(one, other), np.maximum(one, other))
    seen = one == other
    for a, b, _ in found():
        seen |= np.isin(wanted, _key(a, b))
    return Recall(queries=num_queries, neighbours=len(wanted), found=int(seen.sum()))


def _key(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    key: np.ndarray = a << 32 | b  # rows are below 2^31
    return key
