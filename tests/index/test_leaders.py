"""Greedy leaders, against the definition written down as a loop."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.index import leaders
from capfilt.index.hamming import Pairs, stars
from capfilt.index.leaders import greedy_leaders

RADIUS = {"one": 2, "two": 3}


def pairs_of(kind: str, values: np.ndarray) -> Pairs:
    """What a search gives for numbers on a line: stars of equal ones, and pairs of their smallest rows."""
    equal = stars(values, np.arange(len(values)))
    found = [equal.pairs]
    for i, j in product(range(len(equal.values)), repeat=2):
        distance = equal.values[j] - equal.values[i]
        if 0 < distance <= RADIUS[kind]:
            a, b = sorted((equal.hubs[i], equal.hubs[j]))
            found.append(Pairs(np.array([a]), np.array([b]), np.array([distance], np.float32)))
    return Pairs.concat(found)


def by_definition(order: list[int], values: dict[str, np.ndarray]) -> dict[int, tuple[int, int, float]]:
    """row -> (leader, kind or -1, distance): the loop that the rule says, then the nearest kept one for each."""

    def near(row: int, kept: list[int]) -> list[tuple[int, int, int, int]]:
        gaps = [
            (place, abs(int(of[row]) - int(of[other])), order.index(other), other, RADIUS[kind])
            for place, (kind, of) in enumerate(values.items())
            for other in kept
        ]
        return [gap[:4] for gap in gaps if gap[1] <= gap[4]]

    kept: list[int] = []
    for row in order:
        if not near(row, kept):
            kept.append(row)
    result = {row: (row, -1, 0.0) for row in kept}
    for row in set(order) - set(kept):
        place, distance, _, leader = min(near(row, kept))
        result[row] = (leader, place, float(distance))
    return result


class Read:
    """Pairs that can be read again and again, in parts, like files."""

    def __init__(self, values: dict[str, np.ndarray]) -> None:
        self.parts = [(kind, pairs_of(kind, of)) for kind, of in values.items()]

    def __iter__(self) -> Iterator[tuple[str, Pairs]]:
        for kind, pairs in self.parts:
            for start in range(0, len(pairs.a), 3):
                yield kind, Pairs(*(column[start : start + 3] for column in pairs))


@pytest.mark.parametrize("in_memory", [-1, 3, 1_000_000])
@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 60)), min_size=1, max_size=30),
    st.randoms(use_true_random=False),
)
def test_the_definition(in_memory: int, points: list[tuple[int, int]], random: object) -> None:
    """With all passes, with one and a rest, and with the rest alone."""
    values = {kind: np.array([point[i] for point in points]) for i, kind in enumerate(RADIUS)}
    order = list(range(len(points)))
    random.shuffle(order)  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leaders, "IN_MEMORY", in_memory)
        got = greedy_leaders(np.array(order), Read(values), list(RADIUS))
    want = by_definition(order, values)
    rows = zip(got.leader.tolist(), got.kind.tolist(), got.distance.tolist(), strict=True)
    assert dict(enumerate(rows)) == want
    assert set(np.flatnonzero(got.kept)) == {row for row, (leader, _, _) in want.items() if leader == row}


def test_a_chain_of_five_keeps_three() -> None:
    """Frames 20 degrees apart, threshold 21: each kept one is outside of every other's radius."""
    chain = Pairs(np.arange(4), np.arange(1, 5), np.full(4, 0.06, np.float32))
    got = greedy_leaders(np.arange(5), [("vector", chain)], ["vector"])
    assert got.leader.tolist() == [0, 0, 2, 2, 4]
    assert got.kind.tolist() == [-1, 0, -1, 0, -1]


def test_a_long_chain_takes_no_pass_a_link() -> None:
    """A video's frames in order are the worst case for passes."""
    n = 200_000
    chain = Pairs(np.arange(n - 1), np.arange(1, n), np.ones(n - 1, np.float32))
    read = [0]

    class Counted:
        def __iter__(self) -> Iterator[tuple[str, Pairs]]:
            read[0] += 1
            yield "phash", chain

    got = greedy_leaders(np.arange(n), Counted(), ["phash"])
    assert got.kept.sum() == n // 2
    assert read[0] <= 5
