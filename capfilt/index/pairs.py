"""Near pairs of vectors of one list, all of them, with exact cosines.

BLAS in float32 finds candidates a little beyond the radius; the cosine of each is then computed in float64, where the
products of float16 numbers add up exactly (see `lists`), so that neither threads nor the order of vectors matter.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from capfilt.errors import DataError
from capfilt.index.hamming import Pairs, stars

TILE = 4096
"""Vectors on each side of one matrix product."""
MAX_PAIRS = 2**25
"""Of one unit of work: 700 MB while they are sorted."""

_SLACK = 1e-4  # of a float32 cosine, a hundred times its rounding
_LEAST = np.float32(2**-30)  # distance 0 is for equal vectors


def pairs_of_list(number: int, one: np.ndarray, other: np.ndarray | None, within: float) -> Pairs:
    """Near pairs of the records of a list (`lists.records`), or of two parts of it.

    At least one of each pair is in its own list; a pair that two lists would find is given by the smaller one.
    """
    own, visiting, pieces = _distinct(number, one)
    if other is None:
        sides = [(own, None), (own, visiting)]
    else:
        their_own, their_visiting, pieces = *_distinct(number, other)[:2], []
        sides = [(own, their_own), (own, their_visiting), (their_own, visiting)]
    for home, guest in sides:
        pieces += _near(number, home, guest, within)
        if sum(len(piece.a) for piece in pieces) > MAX_PAIRS:
            raise DataError(
                f"more than {MAX_PAIRS:,} pairs of {len(one):,} vectors have a cosine of {1 - within:g} or more: one"
                " would stand for most. Take a larger cosine, or drop exact copies by sha256 and phash first."
            )
    return Pairs.concat(pieces)


def _near(number: int, home: np.ndarray, guest: np.ndarray | None, within: float) -> Iterator[Pairs]:
    """Pairs of one from its own list and another: of the same (None), of another part, or a visitor from its own."""
    guest_values = None if guest is None else guest["value"]
    for i, j, distance in near_in(home["value"], guest_values, within):
        x, y = home[i], (home if guest is None else guest)[j]
        there = y["lists"][:, 0]  # where the pair is found as well, if x is compared there
        here = (there >= number) | ~(x["lists"] == there[:, None]).any(axis=1)
        x, y = x["row"][here], y["row"][here]
        yield Pairs(np.minimum(x, y), np.maximum(x, y), distance[here])


def _distinct(number: int, part: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[Pairs]]:
    """The records of a list without those that repeat a vector: its own and the visitors; and its stars of equal ones.

    Equal vectors are compared in the same lists, so that the smallest row of each value stands for them in all.
    """
    dim = part["value"].shape[1]
    texts = np.ascontiguousarray(part["value"]).view(f"S{2 * dim}")[:, 0]
    is_own = part["lists"][:, 0] == number
    equal = stars(texts[is_own], part["row"][is_own])
    hubs = np.concatenate([equal.hubs, stars(texts[~is_own], part["row"][~is_own]).hubs])
    kept = np.isin(part["row"], hubs)
    return part[kept & is_own], part[kept & ~is_own], [equal.pairs]


def exact_cosines(a: np.ndarray, i: np.ndarray, b: np.ndarray, j: np.ndarray) -> np.ndarray:
    """The cosines of a[i] and b[j], float64 [P]; of float16 vectors exact but for a square root and a division."""
    cosines = np.empty(len(i))
    for start in range(0, len(i), TILE):
        part = slice(start, start + TILE)
        one, other = a[i[part]].astype(np.float64), b[j[part]].astype(np.float64)
        lengths = np.sqrt(np.einsum("pd,pd->p", one, one) * np.einsum("pd,pd->p", other, other))
        cosines[part] = np.einsum("pd,pd->p", one, other) / lengths  # of float16 the lengths are not quite 1
    return cosines


def near_in(a: np.ndarray, b: np.ndarray | None, within: float) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """All i, j with a[i] and b[j] near, and their distances float32, a tile at a time; float16 [N, D], [M, D].

    Without b, pairs of a itself, i < j.
    """
    for start in range(0, len(a), TILE):
        one = units(a[start : start + TILE])
        for begin in range(start if b is None else 0, len(a if b is None else b), TILE):
            other = (a if b is None else b)[begin : begin + TILE]
            i, j = np.nonzero(one @ units(other).T >= 1 - within - _SLACK)
            if b is None and begin == start:
                i, j = i[i < j], j[i < j]
            distances = 1 - exact_cosines(a, start + i, other, j)
            near = distances <= within
            yield start + i[near], begin + j[near], np.maximum(distances[near].astype(np.float32), _LEAST)


def units(vectors: np.ndarray) -> np.ndarray:
    """Vectors [N, D] at length 1, float32."""
    single = vectors.astype(np.float32)
    single /= np.linalg.norm(single, axis=1, keepdims=True)
    return single
