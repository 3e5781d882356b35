"""The order in which a training walks its rows: a function of the seed and of how many rows each shard has.

An epoch lays all shards end to end, shuffled, and cuts the line into equal segments, one for each lane. A lane reads
its segment through windows that are shuffled, too, and every batch takes as many rows from one lane as from another.
So ranks share the lanes out and read different shards; a lane begins in the middle of a shard where shards are few, so
no rank starves; and the position is the number of the step: any number of ranks can go on from it, without reading
what came before.
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
    turn: int
    """How often the epoch has walked the shard before."""


class Order:
    """Which rows each of `lanes` reads, epoch after epoch.

    `sources` are (shards, how often an epoch walks them); 0.2 is a fifth of them, another fifth in the next epoch.
    `rows` says how many rows each shard has.
    """

    def __init__(self, sources: Sequence[tuple[Sequence[str], float]], rows: Mapping[str, int], lanes: int, seed: int):
        self.sources, self.rows, self.lanes, self.seed = sources, rows, lanes, seed
        self._line: dict[int, tuple[list[str], np.ndarray]] = {}
        self._totals: dict[int, int] = {}
        if not any(rows[url] for urls, _ in sources for url in urls):
            urls = [url for own, _ in sources for url in own]
            raise DataError(f"no readable pair in {len(urls)} shards, first {urls[0]}")

    def shards(self, epoch: int) -> list[str]:
        """The shards of an epoch in their order; one that is walked twice is there twice."""
        found: list[str] = []
        for number, (urls, repeat) in enumerate(self.sources):
            whole = int(repeat)
            found += list(urls) * whole
            # The rest goes round a fixed order of the source, on and on from epoch to epoch.
            first, last = (round(e * (repeat - whole) * len(urls)) for e in (epoch, epoch + 1))
            turn = self._draws(number).permutation(len(urls)) if last > first else ()
            found += [urls[turn[i % len(urls)]] for i in range(first, last)]
        return [found[i] for i in self._draws(-1, epoch).permutation(len(found))]

    def spans(self, lane: int, epoch: int) -> list[Span]:
        """The segment of a lane."""
        urls, starts = self._laid_out(epoch)
        begin, end = self._segment(lane, epoch)
        found, walked = [], self._twice(urls)
        for i in range(int(starts.searchsorted(begin, side="right")) - 1, len(urls)):
            first, last = max(begin, int(starts[i])), min(end, int(starts[i + 1]))
            if int(starts[i]) >= end:
                break
            if first < last:
                turn = walked[urls[i]].index(i) if urls[i] in walked else 0
                found.append(Span(urls[i], first - int(starts[i]), last - first, turn))
        return found

    def length(self, lane: int, epoch: int) -> int:
        """How many rows the segment has."""
        begin, end = self._segment(lane, epoch)
        return end - begin

    def locate(self, lane: int, position: int) -> tuple[int, int]:
        """The epoch of a lane's row number `position`, and its number there."""
        epoch = 0
        while position >= (length := self.length(lane, epoch)):
            position -= length
            epoch += 1
        return epoch, position

    def walk(self, lane: int, position: int, window: int, read: Callable[[int, Span], Iterator[T]]) -> Iterator[T]:
        """The rows of a lane from `position` on, without end; `read(epoch, span)` gives the rows of a span.

        Windows begin at other places in other lanes, so that these do not all fill theirs at the same step.
        """
        epoch, offset = self.locate(lane, position)
        while True:
            spans, length = self.spans(lane, epoch), self.length(lane, epoch)
            cuts = [0, *range(1 + window * lane // self.lanes, length, window), length]
            for number, (begin, end) in enumerate(pairwise(cuts)):
                if end <= offset:
                    continue
                if begin <= offset:  # the first window that is read
                    stream = chained(read, epoch, after(spans, begin))
                block = list(islice(stream, end - begin))
                turn = self._draws(lane, epoch, number).permutation(len(block))
                yield from (block[i] for i in turn[max(0, offset - begin) :])
            epoch, offset = epoch + 1, 0

    def _twice(self, urls: Sequence[str]) -> dict[str, list[int]]:
        """The places in an epoch of those shards that it walks more than once."""
        if all(repeat <= 1 for _, repeat in self.sources):
            return {}
        places: dict[str, list[int]] = {}
        for i, url in enumerate(urls):
            places.setdefault(url, []).append(i)
        return {url: own for url, own in places.items() if len(own) > 1}

    def _segment(self, lane: int, epoch: int) -> tuple[int, int]:
        if epoch not in self._totals:
            self._totals[epoch] = int(self._laid_out(epoch)[1][-1])
        total = self._totals[epoch]
        # Segments differ by a row where lanes do not divide the rows: who has the longer ones changes with the epoch.
        turn = (lane + epoch) % self.lanes
        return turn * total // self.lanes, (turn + 1) * total // self.lanes

    def _laid_out(self, epoch: int) -> tuple[list[str], np.ndarray]:
        """An epoch's shards and the number of the row at which each begins; the lanes are in two epochs at most."""
        if epoch not in self._line:
            urls = self.shards(epoch)
            starts = np.cumsum([0, *(self.rows[url] for url in urls)])
            self._line = {e: line for e, line in self._line.items() if abs(e - epoch) <= 1} | {epoch: (urls, starts)}
        return self._line[epoch]

    def _draws(self, *place: int) -> np.random.Generator:
        entropy = [self.seed, *(number + 1 for number in place)]
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))


def after(spans: Iterable[Span], skip: int) -> Iterator[Span]:
    """What is left of spans without their first `skip` rows."""
    for span in spans:
        if skip < span.count:
            yield replace(span, first=span.first + skip, count=span.count - skip)
        skip = max(0, skip - span.count)


def chained(read: Callable[[int, Span], Iterator[T]], epoch: int, spans: Iterable[Span]) -> Iterator[T]:
    """The rows of spans, one after the other."""
    for span in spans:
        yield from read(epoch, span)
