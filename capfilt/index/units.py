"""The units of work of a join: by which key the rows of a pool meet, and how the records of one key are compared.

Keys are the lists of vectors, and parts of each table of hashes. A unit is some keys in a row, or, of a list that is
too large, two parts of it: memory does not grow with a list.
"""

from __future__ import annotations

from itertools import combinations_with_replacement, pairwise
from typing import Any, NamedTuple

import numpy as np

from capfilt.index import hamming, pairs
from capfilt.index.hamming import Pairs, stars
from capfilt.index.lists import records
from capfilt.index.near import Near

UNIT_RECORDS = 2**18
"""Records of a unit of several keys: with vectors of 256 numbers 140 MB."""
LIST_RECORDS = 2**19
"""Records of a list above which it is compared in parts of so many."""


class Unit(NamedTuple):
    """Some keys, `first <= key < last`; with `part >= 0` two parts of one key, or one with itself."""

    first: int
    last: int
    part: int = -1
    other: int = -1


def plan(counts: np.ndarray, near: Near) -> list[Unit]:
    """Units that have every key with records once; `counts` int64 [keys]."""
    units: list[Unit] = []
    ends = np.cumsum(counts)
    first = 0
    while first < len(counts):
        before = int(ends[first] - counts[first])
        last = max(first + 1, int(np.searchsorted(ends, before + UNIT_RECORDS, "right")))
        num_parts = -(-int(counts[first]) // LIST_RECORDS)
        if num_parts > 1 and near.kind == "vector":
            units += [Unit(first, last, *two) for two in combinations_with_replacement(range(num_parts), 2)]
        elif ends[last - 1] > before:
            units.append(Unit(first, last))
        first = last
    return units


def num_keys(near: Near, num_lists: int) -> int:
    """How many keys there are; they are numbered from 0."""
    return num_lists if near.kind == "vector" else hamming.PARTITIONS * len(_tables(near))


def split_hashes(near: Near, values: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The keys and records of hashes, one for each table; uint64 [N] or texts of 64 hex digits [N], int64 [N]."""
    if near.kind == "sha256":
        values = np.frombuffer(bytes.fromhex("".join(values.tolist())), "S32")
        keys = values.view(np.uint8).reshape(-1, 32)[:, 0].astype(np.int64)
    else:
        keys = np.concatenate(
            [table * hamming.PARTITIONS + hamming.partition(values, mask) for table, mask in enumerate(_tables(near))]
        )
    copies = len(keys) // max(1, len(rows))
    made = np.empty(len(keys), np.dtype([("row", "<i8"), ("value", values.dtype.newbyteorder("<"))]))
    made["row"], made["value"] = np.tile(rows, copies), np.tile(values, copies)
    return keys, made


def join(near: Near, keys: np.ndarray, one: np.ndarray, other: np.ndarray | None = None) -> Pairs:
    """The near pairs of the records of a unit, sorted by their keys, or of two parts of the records of one key."""
    if other is not None:
        return pairs.pairs_of_list(int(keys[0]), one, other, near.within)
    edges = [0, *(np.flatnonzero(np.diff(keys)) + 1).tolist(), len(keys)]
    parts = [(int(keys[start]), one[start:end]) for start, end in pairwise(edges)]
    return Pairs.concat([_join_key(near, key, part) for key, part in parts])


def pairs_in_memory(near: Near, values: np.ndarray, rows: np.ndarray) -> Pairs:
    """All near pairs of some rows at once; `values` as `split_hashes` takes them, or vectors float16 [N, D]."""
    if near.kind == "vector":
        return pairs.pairs_of_list(0, records(rows, np.zeros((len(rows), 1), np.int32), values)[1], None, near.within)
    if near.kind == "phash":
        return hamming.near_pairs(values, rows, int(near.within))
    return stars(values.astype("S64"), rows).pairs


def _join_key(near: Near, key: int, part: np.ndarray) -> Pairs:
    if near.kind == "vector":
        return pairs.pairs_of_list(key, part, None, near.within)
    equal = stars(part["value"], part["row"])
    if near.kind == "sha256" or not near.within:
        return equal.pairs
    table = key // hamming.PARTITIONS
    apart = hamming.table_pairs(equal.values, equal.hubs, int(near.within), table)
    return apart if table else Pairs.concat([equal.pairs, apart])


def _tables(near: Near) -> list[Any]:
    return hamming.masks(int(near.within)) if near.kind == "phash" else [None]
