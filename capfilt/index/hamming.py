"""Pairs of 64-bit hashes within a few bits, exact at every radius, by sorting.

Cut 64 bits into m bands. Two hashes that differ in at most r bits differ in at most r bands, so they agree in m - r
bands at least (pigeonhole). For each choice of m - r bands, sort by these bits and compare only those that have all of
them equal: no pair within r bits is missed (Manku, Jain, Das Sarma, WWW 2007). To 3 bits: 4 tables of 16 bits, which is
what faiss's `IndexBinaryMultiHash(64, 4, 16)` keeps as hash maps; a sort and a popcount take a sixth of its time.
"""

from __future__ import annotations

from itertools import combinations, count, pairwise
from typing import NamedTuple

import numpy as np

PARTITIONS = 256
"""Of each table, by its key: hashes of different partitions do not meet in it."""

_ODD = np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing: spreads keys whose high bits are masked away


class Pairs(NamedTuple):
    """Near pairs; a < b."""

    a: np.ndarray
    """int64 [P]: row numbers."""
    b: np.ndarray
    distance: np.ndarray
    """float32 [P]"""

    @classmethod
    def concat(cls, parts: list[Pairs]) -> Pairs:
        """All pairs, sorted by a, then b: the same bytes in whatever order they were found."""
        empty = cls(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
        a, b, distance = (np.concatenate(column) for column in zip(empty, *parts, strict=True))
        order = np.lexsort((b, a))
        return cls(a[order], b[order], distance[order])


class Stars(NamedTuple):
    """Rows by equal values."""

    values: np.ndarray
    """[V]: each value once, ascending."""
    hubs: np.ndarray
    """int64 [V]: the smallest row of each."""
    pairs: Pairs
    """Each further row with the hub of its value, at distance 0."""


def stars(values: np.ndarray, rows: np.ndarray) -> Stars:
    """Join rows of equal values; `values` [N] of any type that sorts, `rows` int64 [N]."""
    order = np.lexsort((rows, values))
    values, rows = values[order], rows[order]
    first = np.ones(len(values), bool)
    first[1:] = values[1:] != values[:-1]
    hub_of = rows[first][np.cumsum(first) - 1]
    a, b = hub_of[~first], rows[~first]
    return Stars(values[first], rows[first], Pairs(a, b, np.zeros(len(a), np.float32)))


def masks(radius: int) -> list[np.uint64]:
    """The bits of each table that finds pairs within a radius."""
    num_bands = radius + 1 if radius <= 3 else radius + 2
    edges = [band * 64 // num_bands for band in range(num_bands + 1)]
    bands = [sum(1 << bit for bit in range(low, high)) for low, high in pairwise(edges)]
    return [np.uint64(sum(chosen)) for chosen in combinations(bands, num_bands - radius)]


def partition(hashes: np.ndarray, mask: np.uint64) -> np.ndarray:
    """The partition of each hash in a table, uint64 [N] -> int64 [N]."""
    return (((hashes & mask) * _ODD) >> np.uint64(56)).astype(np.int64)


def table_pairs(hashes: np.ndarray, rows: np.ndarray, radius: int, table: int) -> Pairs:
    """Pairs within the radius that meet in one table and in none before it.

    `hashes` uint64 [N], each once; `rows` int64 [N]. Memory: some arrays of N numbers, and the pairs.
    """
    tables = masks(radius)
    order = np.argsort(hashes & tables[table], kind="stable")
    hashes, rows = hashes[order], rows[order]
    keys = hashes & tables[table]
    here, found = np.arange(len(keys)), []
    for shift in count(1):  # sorted: whoever has its key `shift` places on has it at every place between
        here = here[: np.searchsorted(here, len(keys) - shift)]
        here = here[keys[here] == keys[here + shift]]
        if not len(here):
            break
        differing = hashes[here] ^ hashes[here + shift]
        bits = np.bitwise_count(differing)
        for earlier in tables[:table]:
            bits[(differing & earlier) == 0] = 255
        near = bits <= radius
        one, other = rows[here[near]], rows[here[near] + shift]
        found.append(Pairs(np.minimum(one, other), np.maximum(one, other), bits[near].astype(np.float32)))
    return Pairs.concat(found)


def near_pairs(hashes: np.ndarray, rows: np.ndarray, radius: int) -> Pairs:
    """All pairs within the radius, equal ones as stars; uint64 [N], int64 [N]. All in memory."""
    equal = stars(hashes, rows)
    found = [
        table_pairs(equal.values, equal.hubs, radius, table) for table in range(len(masks(radius)) if radius else 0)
    ]
    return Pairs.concat([equal.pairs, *found])
