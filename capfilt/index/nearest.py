"""The nearest of a small set of references for each of many queries, by hash or by vector; all are compared.

Equal distances go to the first reference, and a cosine is computed again in float64 before it is compared, so that the
answer depends neither on the size of a batch nor on how many threads multiplied the matrices.
"""

from __future__ import annotations

import numpy as np

from capfilt.index.pairs import exact_cosines, units

PAIRS_AT_ONCE = 8_000_000
"""Pairs of a query and a reference that are compared in one step: 64 MB of them."""
NOTHING = -1
"""The row of a query that no reference is near."""

_ROUNDING = 1e-3  # of a cosine of unit vectors in float32, amply


def nearest_hashes(queries: np.ndarray, references: np.ndarray, radius: int) -> tuple[np.ndarray, np.ndarray]:
    """The nearest reference within `radius` bits of each query; both are 64-bit hashes, uint64 [N] and [M].

    Returns rows of references, int64 [N], NOTHING where none is so near, and the bits that differ, float64 [N].
    """
    rows, distances = _none(len(queries))
    for block in _blocks(len(queries), len(references)):
        bits = np.bitwise_count(queries[block, None] ^ references[None])
        best = bits.argmin(1)
        least = np.take_along_axis(bits, best[:, None], 1)[:, 0]
        rows[block] = np.where(least <= radius, best, NOTHING)
        distances[block] = np.where(least <= radius, least, np.nan)
    return rows, distances


def nearest_vectors(queries: np.ndarray, references: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
    """The reference of the highest cosine, of `least` or more, of each query; unit vectors, float [N, D] and [M, D].

    Returns rows of references, int64 [N], NOTHING where none is so near, and the cosines, float64 [N].
    """
    rows, cosines = _none(len(queries))
    wide = units(references)
    for block in _blocks(len(queries), len(references)):
        rough = units(queries[block]) @ wide.T
        near = np.argwhere(rough >= np.maximum(rough.max(1, keepdims=True), least) - 2 * _ROUNDING)
        near[:, 0] += block.start
        exact = exact_cosines(queries, near[:, 0], references, near[:, 1])
        # The best of each query last, of several the first reference, so that it overwrites the others.
        order = np.lexsort((-near[:, 1], exact, near[:, 0]))
        order = order[exact[order] >= least]
        rows[near[order, 0]], cosines[near[order, 0]] = near[order, 1], exact[order]
    return rows, cosines


def _none(count: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full(count, NOTHING, np.int64), np.full(count, np.nan)


def _blocks(queries: int, references: int) -> list[slice]:
    if not references:
        return []
    step = max(1, PAIRS_AT_ONCE // references)
    return [slice(start, min(start + step, queries)) for start in range(0, queries, step)]
