"""The order in which a training walks its rows: a function of the seed and of how many rows each shard has.

An epoch lays all shards end to end, shuffled, and cuts the line into equal segments, one for each lane. A lane reads
its segment in windows whose rows are shuffled, and every batch takes as many rows from one lane as from another. So
ranks divide the lanes among them and read different shards; a lane begins in the middle of a shard where shards are
few, so that no rank is without rows; and the position is the number of the step: any number of ranks can go on from it,
without reading what came before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import TypeVar

import numpy as np

from capfilt.errors import DataError

T = TypeVar("T")


@dataclass(frozen=True)
class Span:
    """Consecutive rows of one shard."""

    url: str
    first: int
    count: int
    repetition: int
    """How often the epoch has read the shard before."""


class RowOrder:
    """Which rows each of `lanes` reads, epoch after epoch.

    Args:
        sources: shards, and how often an epoch reads them; 0.2 is a fifth of them, another fifth in the next epoch.
        rows: the number of rows of each shard.

    Raises:
        DataError: no shard has a row.
    """

    def __init__(self, sources: Sequence[tuple[Sequence[str], float]], rows: Mapping[str, int], lanes: int, seed: int):
        self.sources, self.rows, self.lanes, self.seed = sources, rows, lanes, seed
        self._layouts: dict[int, tuple[list[str], np.ndarray, dict[str, dict[int, int]]]] = {}
        self._permutations: dict[int, np.ndarray] = {}
        self._totals: dict[int, int] = {}
        self._whole = sum(int(repeat) * sum(rows[url] for url in urls) for urls, repeat in sources)
        if not any(rows[url] for urls, _ in sources for url in urls):
            urls = [url for shards, _ in sources for url in shards]
            raise DataError(f"no readable pair in {len(urls)} shards, first {urls[0]}")

    def shards(self, epoch: int) -> list[str]:
        """The shards of an epoch in their order; one that is read twice is there twice."""
        chosen: list[str] = []
        for number, (urls, repeat) in enumerate(self.sources):
            chosen += [*list(urls) * int(repeat), *self._fraction(number, epoch)]
        return [chosen[i] for i in self._generator(-1, epoch).permutation(len(chosen))]

    def _fraction(self, number: int, epoch: int) -> list[str]:
        """What an epoch reads of a source beside whole repetitions: the next shards of a fixed permutation, on and on
        from epoch to epoch."""
        urls, repeat = self.sources[number]
        first, last = (round(e * (repeat - int(repeat)) * len(urls)) for e in (epoch, epoch + 1))
        if last == first:
            return []
        if number not in self._permutations:
            self._permutations[number] = self._generator(number).permutation(len(urls))
        return [urls[self._permutations[number][i % len(urls)]] for i in range(first, last)]

    def spans(self, lane: int, epoch: int) -> list[Span]:
        """The segment of a lane, as spans of shards."""
        urls, starts, repeated = self._layout(epoch)
        begin, end = self._segment(lane, epoch)
        spans = []
        for i in range(int(starts.searchsorted(begin, side="right")) - 1, len(urls)):
            first, last = max(begin, int(starts[i])), min(end, int(starts[i + 1]))
            if int(starts[i]) >= end:
                break
            if first < last:
                repetition = repeated[urls[i]][i] if urls[i] in repeated else 0
                spans.append(Span(urls[i], first - int(starts[i]), last - first, repetition))
        return spans

    def length(self, lane: int, epoch: int) -> int:
        """How many rows the segment of a lane has."""
        begin, end = self._segment(lane, epoch)
        return end - begin

    def locate(self, lane: int, position: int) -> tuple[int, int]:
        """The epoch of a lane's row number `position`, and its number in that epoch."""
        epoch = 0
        while position >= (length := self.length(lane, epoch)):
            position -= length
            epoch += 1
        return epoch, position

    def walk(self, lane: int, position: int, window: int, read: Callable[[int, Span], Iterator[T]]) -> Iterator[T]:
        """The rows of a lane from `position` on, without end.

        Windows begin at other rows in other lanes, so that these do not all fill theirs at the same step.

        Args:
            window: rows that are shuffled together.
            read: gives the rows of a span, in an epoch.
        """
        epoch, offset = self.locate(lane, position)
        while True:
            spans, length = self.spans(lane, epoch), self.length(lane, epoch)
            cuts = [0, *range(1 + window * lane // self.lanes, length, window), length]
            for number, (begin, end) in enumerate(pairwise(cuts)):
                if end <= offset:
                    continue
                if begin <= offset:  # the first window that is read
                    stream = _read_spans(read, epoch, _without_first(spans, begin))
                rows = list(islice(stream, end - begin))
                permutation = self._generator(lane, epoch, number).permutation(len(rows))
                yield from (rows[i] for i in permutation[max(0, offset - begin) :])
            epoch, offset = epoch + 1, 0

    def _repeated(self, urls: Sequence[str]) -> dict[str, dict[int, int]]:
        """Of those shards that an epoch reads more than once: the place of each reading, and how many came before."""
        if all(repeat <= 1 for _, repeat in self.sources):
            return {}
        places: dict[str, list[int]] = {}
        for i, url in enumerate(urls):
            places.setdefault(url, []).append(i)
        return {
            url: {place: n for n, place in enumerate(indices)} for url, indices in places.items() if len(indices) > 1
        }

    def _segment(self, lane: int, epoch: int) -> tuple[int, int]:
        """The first row of a lane's segment, and the first behind it."""
        if epoch not in self._totals:  # without its shuffle: a resumed training asks it of all epochs that it is past
            fractions = (self._fraction(number, epoch) for number in range(len(self.sources)))
            self._totals[epoch] = self._whole + sum(self.rows[url] for urls in fractions for url in urls)
        total = self._totals[epoch]
        # Where lanes do not divide the rows, segments differ by a row: which are longer changes with the epoch.
        segment = (lane + epoch) % self.lanes
        return segment * total // self.lanes, (segment + 1) * total // self.lanes

    def _layout(self, epoch: int) -> tuple[list[str], np.ndarray, dict[str, dict[int, int]]]:
        """An epoch's shards, the row at which each begins, and `_repeated`; kept for the epochs that lanes are in."""
        if epoch not in self._layouts:
            urls = self.shards(epoch)
            starts = np.cumsum([0, *(self.rows[url] for url in urls)])
            near = {e: layout for e, layout in self._layouts.items() if abs(e - epoch) <= 1}
            self._layouts = near | {epoch: (urls, starts, self._repeated(urls))}
        return self._layouts[epoch]

    def _generator(self, *key: int) -> np.random.Generator:
        entropy = [self.seed, *(number + 1 for number in key)]
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))


def _without_first(spans: Iterable[Span], num_rows: int) -> Iterator[Span]:
    """Spans without their first rows."""
    for span in spans:
        if num_rows < span.count:
            yield replace(span, first=span.first + num_rows, count=span.count - num_rows)
        num_rows = max(0, num_rows - span.count)


def _read_spans(read: Callable[[int, Span], Iterator[T]], epoch: int, spans: Iterable[Span]) -> Iterator[T]:
    """The rows of spans, one after the other."""
    for span in spans:
        yield from read(epoch, span)
