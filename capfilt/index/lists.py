"""Inverted lists: vectors by the nearest of some thousand centroids, the same lists whatever computes them.

Vectors and centroids are float16 of about unit length. Products of two are multiples of 2^-48 and their sum is below 2,
so float64 holds it exactly, in any order: faiss gives a few candidates more than are needed, and where its float32
products lie too near each other the exact ones decide. Threads, BLAS or a GPU do not change a byte, unless four
centroids lie within a float32's rounding.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from capfilt.index import segments
from capfilt.storage.atomic import atomic
from capfilt.storage.paths import StoragePath

FLAT_BELOW = 50_000
"""Rows below which all vectors are one list: every pair is compared."""
SAMPLE = 50
"""Vectors a list that its centroids are trained on."""
ROUNDS = 4
"""Of k-means."""
QUERIES = 1000
"""Rows whose neighbours are searched exactly, to estimate the recall."""

_SPARE = 3  # candidates of faiss beyond those needed
_TILE = 4096  # vectors that are assigned at once
_ROUNDING = 1e-6
_UNSURE = 1e-5  # a difference of float32 products below which the exact ones decide


def num_lists(num_rows: int) -> int:
    """How many lists a pool gets: those that clip-retrieval's autofaiss takes."""
    if num_rows < FLAT_BELOW:
        return 1
    if num_rows < 1_000_000:
        return int(4 * math.sqrt(num_rows))
    steps = {10_000_000: 16_384, 300_000_000: 65_536}
    return next((lists for most, lists in steps.items() if num_rows <= most), 131_072)


class Lists(NamedTuple):
    """What a worker needs to know of the lists of a pool."""

    centroids: np.ndarray
    """float16 [L, D]"""
    queries: np.ndarray
    """int64 [Q]: the rows whose neighbours are searched exactly; none for one list, which is exact."""
    vectors: np.ndarray
    """float16 [Q, D]: theirs."""

    def save(self, path: StoragePath) -> None:
        with atomic(path) as file:
            for array in self:
                np.save(file, array)

    @classmethod
    def load(cls, path: StoragePath) -> Lists:
        """Read what `save` wrote. RunError for a damaged file."""
        return cls(*segments.arrays(path, 3))


def train(vectors: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Centroids of spherical k-means, float16 [count, D]; `vectors` float16 [N, D], N >= count."""
    draw = np.random.default_rng(seed)
    centroids = vectors[np.sort(draw.choice(len(vectors), count, replace=False))]
    for _ in range(ROUNDS):
        nearest = Nearest(centroids)
        ids = nearest(vectors, 1)[0]
        order = np.argsort(ids[:, 0], kind="stable")
        sizes = np.bincount(ids[:, 0], minlength=count)
        filled = np.flatnonzero(sizes)
        starts = (np.cumsum(sizes) - sizes)[filled]
        means = np.zeros((count, vectors.shape[1]))
        for column in range(0, vectors.shape[1], 64):  # all of them as float64 would be four times the sample
            part = vectors[order, column : column + 64].astype(np.float64)
            means[filled, column : column + 64] = np.add.reduceat(part, starts)
        if len(filled) < count:
            products = np.concatenate(
                [nearest.products(vectors[i : i + _TILE], ids[i : i + _TILE])[:, 0] for i in range(0, len(ids), _TILE)]
            )
            means[sizes == 0] = vectors[np.argsort(products, kind="stable")[: count - len(filled)]]
        centroids = (means / np.linalg.norm(means, axis=1, keepdims=True)).astype(np.float16)
    return centroids


class Nearest:
    """Finds the nearest centroids, on the GPUs of a faiss that has any."""

    def __init__(self, centroids: np.ndarray) -> None:
        import faiss

        self.centroids = centroids.astype(np.float64)
        index: Any = faiss.IndexFlatIP(centroids.shape[1])
        index.add(centroids.astype(np.float32))
        if getattr(faiss, "get_num_gpus", int)():  # not tested: no machine of ours has had faiss-gpu
            index = faiss.index_cpu_to_all_gpus(index)
        self._index = index

    def __call__(self, vectors: np.ndarray, wanted: int) -> tuple[np.ndarray, np.ndarray]:
        """The lists whose centroids are nearest, first the nearest, of equal ones the smaller number, int64
        [N, wanted]; and their products with the vectors, float32, rounded. `vectors` float16 [N, D]."""
        wanted = min(wanted, len(self.centroids))
        ids, products = np.zeros((len(vectors), wanted), np.int64), np.zeros((len(vectors), wanted), np.float32)
        for start in range(0, len(vectors), _TILE):
            part = vectors[start : start + _TILE]
            rounded, near = self._index.search(part.astype(np.float32), min(wanted + _SPARE, len(self.centroids)))
            again = np.flatnonzero((-np.diff(rounded, axis=1)[:, :wanted] < _UNSURE).any(axis=1))
            exact = self.products(part[again], near[again])
            near[again] = np.take_along_axis(near[again], np.lexsort((near[again], -exact)), 1)
            ids[start : start + _TILE], products[start : start + _TILE] = near[:, :wanted], rounded[:, :wanted]
        return ids, products

    def products(self, vectors: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """The exact products of vectors with some centroids each, float64 [N, K]."""
        result: np.ndarray = np.einsum("nd,nkd->nk", vectors.astype(np.float64), self.centroids[ids])
        return result


def assign(nearest: Nearest, vectors: np.ndarray, within: float, probes: int) -> np.ndarray:
    """The lists in which each vector is compared, int32 [N, probes]: its own, then others, then -1.

    List h is its own, as x.c_h is the largest product. A near vector y lies in list l only if the plane between them,
    {z: z.(c_h - c_l) = 0}, cuts the segment from x to y, so the distances of x and y from the plane add up to at most
    |x - y|, and one of them is within half of it. Hence x goes to list l as well if its distance from that plane,
    x.(c_h - c_l) / |c_h - c_l|, is at most half the radius, and of two near vectors one always visits the list of the
    other. What is lost is only beyond `probes` lists.
    """
    ids, rounded = nearest(vectors, probes)
    half = math.sqrt(2 * within) / 2 + _ROUNDING
    lengths, centroids = np.linalg.norm(vectors.astype(np.float32), axis=1), nearest.centroids.astype(np.float32)
    lists = np.full((len(vectors), probes), -1, np.int32)
    lists[:, 0] = ids[:, 0]
    for place in range(1, ids.shape[1]):
        two = ids[:, [0, place]]
        apart = np.linalg.norm(centroids[two[:, 0]] - centroids[two[:, 1]], axis=1)
        room = half * apart * lengths - (rounded[:, 0] - rounded[:, place])
        unsure = np.flatnonzero(np.abs(room) < _UNSURE)
        room[unsure] = _exact_room(nearest, vectors[unsure], two[unsure], half)
        lists[room >= 0, place] = two[room >= 0, 1]
    return lists


def _exact_room(nearest: Nearest, vectors: np.ndarray, two: np.ndarray, half: float) -> np.ndarray:
    """How much nearer than needed each vector is to the plane between its list and another, float64 [N]."""
    products = nearest.products(vectors, two)
    apart = np.linalg.norm(nearest.centroids[two[:, 0]] - nearest.centroids[two[:, 1]], axis=1)
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    room: np.ndarray = half * apart * lengths - (products[:, 0] - products[:, 1])
    return room


def records(rows: np.ndarray, lists: np.ndarray, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The keys and records of vectors, one for each list in which a vector is compared.

    A record has `row` int64, the row of the pool, `lists` int32 [probes], and `value` float16 [D], the vector.
    """
    which, place = np.nonzero(lists >= 0)
    kind = np.dtype([("row", "<i8"), ("lists", "<i4", (lists.shape[1],)), ("value", "<f2", (vectors.shape[1],))])
    made = np.empty(len(which), kind)
    made["row"], made["lists"], made["value"] = rows[which], lists[which], vectors[which]
    return lists[which, place].astype(np.int64), made
