"""Greedy leaders: of near items the first is kept, and an item goes only if a *kept* item stands within the radius.

SemDeDup and NeMo Curator drop whatever has any earlier neighbour, kept or not: of five frames in a row, each near the
next, they keep one, though the last is far from it. Here the first, third and fifth stay.

The rule looks sequential and needs no pass an item: in one pass over all pairs, whoever has a kept neighbour goes, and
whoever has no undecided neighbour before it stays. A few passes decide all but long chains (Blelloch, Fineman, Shun,
SPAA 2012), and what is left of the pairs fits memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from capfilt.index.hamming import Pairs

NONE = np.iinfo(np.int64).max
IN_MEMORY = 4_000_000
"""Pairs of undecided items that are held in memory, some 100 bytes each while they are sorted."""

_OPEN, _KEPT, _GONE = 0, 1, 2


@dataclass(frozen=True)
class Leaders:
    """What became of each row."""

    leader: np.ndarray
    """int64 [N]: the kept row that stands for it; of a kept row itself. It is the nearest by the first kind that has
    one within its radius, and of equally near ones the first in the order; it may come after the row in the order,
    where another kept one had the row go."""
    kind: np.ndarray
    """int8 [N]: by which kind, as its place in `kinds`; -1 of a kept row."""
    distance: np.ndarray
    """float32 [N]: to its leader, 0 of a kept row."""

    @property
    def kept(self) -> np.ndarray:
        """bool [N]"""
        return self.kind < 0


def greedy_leaders(order: np.ndarray, pairs: Iterable[tuple[str, Pairs]], kinds: Sequence[str]) -> Leaders:
    """Go through the rows in an order, the ones to be kept first, and keep each that no kept one stands near.

    The result depends on the order and on the set of pairs alone.

    Args:
        order: int64 [N], a permutation of the rows.
        pairs: near pairs by kind, as `PairFiles` gives them: those at distance 0 are stars, those beyond are between
            the smallest rows of equal values. Iterated several times.
        kinds: all kinds that occur; the first ones are named first as the reason.

    Memory: for each row 17 bytes and 40 for each kind, and at most `IN_MEMORY` pairs.
    """
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    greedy = _Greedy(rank, _hubs(len(order), pairs, kinds))
    while (greedy.state == _OPEN).any():
        num_left = greedy.decide(_between_hubs(pairs))
        if num_left <= IN_MEMORY:
            greedy.finish(order, _between_hubs(pairs))
    return greedy.leaders(order, _between_hubs(pairs), kinds)


def _hubs(num_rows: int, pairs: Iterable[tuple[str, Pairs]], kinds: Sequence[str]) -> dict[str, np.ndarray]:
    """By kind, the smallest row with the same value as each row, int64 [N]."""
    hubs = {kind: np.arange(num_rows) for kind in kinds}
    for kind, (a, b, distance) in pairs:
        hubs[kind][b[distance == 0]] = a[distance == 0]
    return hubs


def _between_hubs(pairs: Iterable[tuple[str, Pairs]]) -> Iterator[tuple[str, Pairs]]:
    for kind, (a, b, distance) in pairs:
        apart = distance > 0
        if apart.any():
            yield kind, Pairs(a[apart], b[apart], distance[apart])


class _Greedy:
    """The state of all rows, and its passes. "First" is by rank; a hub stands for all rows of its value."""

    def __init__(self, rank: np.ndarray, hubs: dict[str, np.ndarray]) -> None:
        self.rank = rank
        self.hubs = hubs
        self.state = np.zeros(len(rank), np.int8)

    def decide(self, pairs: Iterable[tuple[str, Pairs]]) -> int:
        """One pass over all pairs; returns how many are still between values with undecided rows."""
        first_open, first_kept = self._first(_OPEN), self._first(_KEPT)
        near_open = {kind: first.copy() for kind, first in first_open.items()}
        near_kept = {kind: first.copy() for kind, first in first_kept.items()}
        num_left = 0
        for kind, (a, b, _) in pairs:
            for one, other in ((a, b), (b, a)):
                np.minimum.at(near_open[kind], one, first_open[kind][other])
                np.minimum.at(near_kept[kind], one, first_kept[kind][other])
            num_left += int(((first_open[kind][a] != NONE) & (first_open[kind][b] != NONE)).sum())
        undecided = self.state == _OPEN
        blocked = np.zeros(len(self.rank), bool)
        covered = np.zeros(len(self.rank), bool)
        for kind, hub in self.hubs.items():
            blocked |= near_open[kind][hub] < self.rank
            covered |= near_kept[kind][hub] < self.rank
        self.state[undecided & covered] = _GONE
        self.state[undecided & ~covered & ~blocked] = _KEPT
        return num_left

    def finish(self, order: np.ndarray, pairs: Iterable[tuple[str, Pairs]]) -> None:
        """Decide the rest one by one: its pairs fit memory."""
        rows = order[self.state[order] == _OPEN]
        is_open = {kind: first != NONE for kind, first in self._first(_OPEN).items()}
        has_kept = {kind: first != NONE for kind, first in self._first(_KEPT).items()}
        near = self._neighbours(rows, pairs, is_open, has_kept)
        for place, row in enumerate(rows.tolist()):
            gone = False
            for kind, (start, end, others) in near.items():
                kept = has_kept[kind]
                gone = gone or bool(kept[self.hubs[kind][row]] or kept[others[start[place] : end[place]]].any())
            self.state[row] = _GONE if gone else _KEPT
            for kind, hub in self.hubs.items():
                has_kept[kind][hub[row]] |= not gone

    def _neighbours(
        self,
        rows: np.ndarray,
        pairs: Iterable[tuple[str, Pairs]],
        is_open: dict[str, np.ndarray],
        has_kept: dict[str, np.ndarray],
    ) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """By kind, the hubs near each row that may have a kept row; those of rows[i]: `others[start[i] : end[i]]`."""
        ends: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {kind: [] for kind in self.hubs}
        for kind, (a, b, _) in pairs:
            alive = is_open[kind] | has_kept[kind]
            relevant = alive[a] & alive[b] & (is_open[kind][a] | is_open[kind][b])
            one, other = a[relevant], b[relevant]
            ends[kind] += [(one, other), (other, one)]
        near = {}
        for kind, parts in ends.items():
            one, other = np.concatenate([np.empty((2, 0), np.int64), *map(np.stack, parts)], axis=1)
            by = np.argsort(one, kind="stable")
            one, other = one[by], other[by]
            hub = self.hubs[kind][rows]
            near[kind] = np.searchsorted(one, hub), np.searchsorted(one, hub, "right"), other
        return near

    def leaders(self, order: np.ndarray, pairs: Iterable[tuple[str, Pairs]], kinds: Sequence[str]) -> Leaders:
        """For each row the nearest kept one: distance and rank in one number, so that the smallest is the nearest."""
        first = self._first(_KEPT)
        nearest = {kind: _number(np.zeros(1, np.float32), ranks) for kind, ranks in first.items()}
        for kind, (a, b, distance) in pairs:
            for one, other in ((a, b), (b, a)):
                np.minimum.at(nearest[kind], one, _number(distance, first[kind][other]))
        leader = np.arange(len(order))
        by = np.full(len(order), -1, np.int8)
        apart = np.zeros(len(order), np.float32)
        for place, kind in enumerate(kinds):
            number = nearest[kind][self.hubs[kind]]
            here = (self.state == _GONE) & (by < 0) & (number != NONE)
            by[here] = place
            leader[here] = order[number[here] & 0xFFFFFFFF]
            apart[here] = (number[here] >> 32).astype(np.uint32).view(np.float32)
        return Leaders(leader, by, apart)

    def _first(self, state: int) -> dict[str, np.ndarray]:
        """By kind, the first rank in a state of each hub's value, int64 [N]; NONE where there is none."""
        rows = np.flatnonzero(self.state == state)
        first = {kind: np.full(len(self.rank), NONE) for kind in self.hubs}
        for kind, hub in self.hubs.items():
            np.minimum.at(first[kind], hub[rows], self.rank[rows])
        return first


def _number(distance: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """int64: the bits of a float that is not negative sort like the float; below them 32 bits of the rank."""
    return np.where(rank == NONE, NONE, distance.view(np.uint32).astype(np.int64) << 32 | rank)
