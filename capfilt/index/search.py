"""The nearest vectors of an index on disk: the lists nearest to a query, mapped into memory, are read and no others.

Cosines are computed in float64 from float16 numbers (see `lists`), so that a search gives the same on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from capfilt.index.lists import Lists, Nearest
from capfilt.index.segments import Segment
from capfilt.storage.paths import StoragePath

PROBES = 32
"""Lists that are read for a query."""

_TILE = 16_384  # vectors that are compared with all queries at once
_SLACK = 1e-4  # of a float32 cosine, a hundred times its rounding


class Hits(NamedTuple):
    """The nearest vectors of one query, the nearest first; of equally near ones the first row."""

    rows: np.ndarray
    """int64 [k]: rows of the pool; fewer where there are no more."""
    cosines: np.ndarray
    """float64 [k]"""


class VectorIndex:
    """The lists of an index and the vectors in them."""

    def __init__(self, known: Lists, paths: Sequence[StoragePath]) -> None:
        """Read the centroids and the sizes of the lists. RunError for a damaged file."""
        self.known = known
        self.nearest = Nearest(known.centroids)
        self.segments = [Segment(path) for path in paths]

    def search(self, query: np.ndarray, wanted: int, num_blocks: int | None = None) -> Hits:
        """The nearest vectors to a query, float [D], among those in the PROBES lists nearest to it, of all blocks or
        the first ones."""
        half = query.astype(np.float16)
        numbers = np.sort(self.nearest(half[None], PROBES)[0][0]).tolist()
        blocks = self.segments[:num_blocks]
        parts = [
            segment.mapped(*segment.edges[number : number + 2].tolist()) for segment in blocks for number in numbers
        ]
        return _nearest(half, np.concatenate(parts), wanted)

    def recall(self, wanted: int, num_blocks: int) -> tuple[int, int]:
        """How many nearest neighbours the queries have in the first blocks, and how many of these `search` gives.

        A query is no neighbour of itself.
        """
        neighbours = found = 0
        exact = self._search_all(wanted + 1, num_blocks)
        for query, vector, hits in zip(self.known.queries, self.known.vectors, exact, strict=True):
            truth = hits.rows[hits.rows != query][:wanted]
            neighbours += len(truth)
            found += int(np.isin(truth, self.search(vector, wanted + 1, num_blocks).rows).sum())
        return neighbours, found

    def _search_all(self, wanted: int, num_blocks: int) -> list[Hits]:
        """The nearest vectors of all queries among all vectors of the first blocks."""
        queries = self.known.vectors
        best = [np.empty(0, self.segments[0].kind) for _ in queries]
        for segment in self.segments[:num_blocks]:
            for start in range(0, len(segment), _TILE):
                part = segment.mapped(start, min(start + _TILE, len(segment)))
                close = queries.astype(np.float32) @ part["value"].astype(np.float32).T
                place = len(part) - min(wanted, len(part))
                least = np.partition(close, place, axis=1)[:, place]
                for i, near in enumerate(close >= least[:, None] - _SLACK):
                    best[i] = np.concatenate([best[i], part[near]])
            for i, records in enumerate(best):
                best[i] = records[np.isin(records["row"], _nearest(queries[i], records, wanted).rows)]
        return [_nearest(query, records, wanted) for query, records in zip(queries, best, strict=True)]


def _nearest(query: np.ndarray, records: np.ndarray, wanted: int) -> Hits:
    vectors, exact = records["value"].astype(np.float64), query.astype(np.float64)
    lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors) * (exact @ exact))
    cosines = np.einsum("nd,d->n", vectors, exact) / lengths
    order = np.lexsort((records["row"], -cosines))[:wanted]
    return Hits(records["row"][order], cosines[order])
