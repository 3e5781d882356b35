"""The rows of a training, a picture with one text each, read from shards and counted.

Every text of an image is a row of its own (BLIP counts so: COCO's five captions are five rows), or every image is one,
with a text drawn anew in each epoch (BLIP-2). Pictures are not decoded here.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from capfilt.data import shards
from capfilt.data.images.augment import generator
from capfilt.data.loading.config import Captions
from capfilt.data.loading.order import Span
from capfilt.data.loading.task_texts import count_texts
from capfilt.data.regions import has_regions
from capfilt.data.sample import FailedSample, Sample
from capfilt.data.shards.members import MemberCounts
from capfilt.errors import DataError, StorageError

PAUSES = (1, 5, 30, 120, 300)
"""Seconds between tries to go on with a shard whose storage failed."""
KEPT_BYTES = 256 * 2**20
"""Bytes of shards that a reader keeps in memory: all of a small data set, a negligible part of a large one."""


@dataclass(frozen=True)
class Row:
    """One training pair before its picture is decoded."""

    shard: str
    uid: str
    image: bytes
    text: str


class RowReader:
    """Reads the rows of spans of shards.

    Args:
        captions: whether each text of an image is a row, or each image with one text drawn for the epoch.
        weights: for captions "one", the weight of a text's source in the draw; 1 where not given.
        seed: of the draws.
        counted: the number of rows of each shard, by its url.
    """

    def __init__(self, captions: Captions, weights: Mapping[str, float], seed: int, counted: Mapping[str, int]):
        self._captions, self._weights, self._seed, self._counted = captions, weights, seed, counted
        self._kept: dict[str, list[Sample]] = {}
        self._room = KEPT_BYTES
        self.closed = threading.Event()
        """Set where nobody wants more rows: a wait for a storage that failed then ends."""

    def keeps(self, url: str) -> bool:
        """Whether the shard stays in memory: its rows have the same bytes, the very objects, in every epoch."""
        return url in self._kept

    def read(self, epoch: int, span: Span) -> Iterator[Row]:
        """The rows of a span; where storage fails, it is tried again after each of PAUSES.

        Raises:
            StorageError: the storage failed at every try.
            DataError: the shard has fewer rows than were counted.
        """
        num_read, pauses = 0, iter(PAUSES)
        while True:
            before = num_read
            try:
                for row in islice(self._rows(span, epoch), span.first + num_read, span.first + span.count):
                    num_read += 1
                    yield row
                break
            except StorageError as error:
                if num_read > before:
                    pauses = iter(PAUSES)
                if (pause := next(pauses, None)) is None:
                    raise
                logging.getLogger(__name__).warning("%s; again in %d s", error, pause)
                if self.closed.wait(pause):
                    raise
        if num_read < span.count:
            raise DataError(
                f"{span.url} has {span.first + num_read} rows, and {self._counted[span.url]} were counted: it changed."
                " Training needs shards that stay as they are; begin again in another --out."
            )

    def _rows(self, span: Span, epoch: int) -> Iterator[Row]:
        """All rows of the shard that a span is of."""
        for sample in self._samples(span.url):
            captions = sample.captions if self._captions == "all" else [self._draw(sample, epoch, span.repetition)]
            for caption in captions:
                yield Row(span.url, sample.uid, sample.image, str(caption["text"]))

    def _samples(self, url: str) -> Iterable[Sample]:
        """The samples of a shard that have a text.

        The first small shards stay in memory: lanes that begin in the middle of a shard, and all later epochs, would
        read it again from its start.
        """
        if url in self._kept:
            return self._kept[url]
        samples = (item for item in self._open(url) if isinstance(item, Sample) and self._has_rows(item))
        size = shards.stat(url)["size"]
        if size is None or size > self._room:
            return samples
        self._kept[url] = list(samples)
        self._room -= size
        return self._kept[url]

    def _open(self, url: str) -> Iterator[Sample | FailedSample]:
        """All that a shard holds, or a file of texts."""
        return shards.read_lines(url) if shards.is_lines(url) else shards.read(url)

    def _has_rows(self, sample: Sample) -> bool:
        return bool(sample.captions)

    def _draw(self, sample: Sample, epoch: int, repetition: int) -> dict[str, Any]:
        """One of an image's texts, for this epoch; another draw where the epoch has the shard again."""
        captions = sample.captions
        weights = np.array([self._weights.get(caption["source"], 1.0) for caption in captions])
        again = (repetition,) if repetition else ()
        draw = generator(self._seed, epoch, *again, sample.uid).random() * weights.sum()
        return captions[min(int(np.searchsorted(weights.cumsum(), draw, side="right")), len(captions) - 1)]


class LaneRows:
    """The rows of a lane, which may be looked ahead at before they are taken."""

    def __init__(self, rows: Iterator[Row]):
        self._rows, self._peeked = rows, deque[Row]()

    def take(self, count: int) -> list[Row]:
        return [self._peeked.popleft() if self._peeked else next(self._rows) for _ in range(count)]

    def peek(self) -> Iterator[Row]:
        """The rows that will be taken next, which stay where they are."""
        for i in itertools.count():
            if i == len(self._peeked):
                self._peeked.append(next(self._rows))
            yield self._peeked[i]


# ---- counting ----


@dataclass(frozen=True)
class PairCount:
    """How many images of a shard can be trained on, and how many texts they have."""

    images: int
    texts: int
    without_text: int = 0
    """Images beside these that have no text (`sample.is_text`), which cannot be trained on."""
    of_tasks: Counter[str] = field(default_factory=Counter)
    """Texts about the images that downstream tasks answer, by their kind (`RowKind`)."""
    with_regions: int = 0
    """Images, with a text or without, that have regions."""

    def num_rows(self, captions: Captions) -> int:
        """Rows, where each text is one or each image is."""
        return self.texts if captions == "all" else self.images


def count_pairs(url: str, digest: shards.Digest | None = None, members: MemberCounts | None = None) -> PairCount:
    """Read a shard to its end and count its images and texts; `members` counts its members."""
    items = shards.read_lines(url, digest) if shards.is_lines(url) else shards.read(url, digest, members)
    texts, of_tasks, with_regions = list[int](), Counter[str](), 0
    for item in items:
        if isinstance(item, Sample):
            texts.append(len(item.captions))
            of_tasks += count_texts(item.meta)
            with_regions += has_regions(item.meta)
    return PairCount(sum(map(bool, texts)), sum(texts), texts.count(0), of_tasks, with_regions)
