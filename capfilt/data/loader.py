"""Batches of (image, text) pairs, streamed from shards in an order that is a function of the seed.

Every text of an image is a row of its own (BLIP counts so: COCO's five captions are five rows), or every image is one,
with a text drawn anew in each epoch (BLIP-2). The position in the data is one number, the step: any number of ranks
started there goes on with exactly the rows that come next (`order.py`).
"""

from __future__ import annotations

import hashlib
import math
import queue
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from capfilt.config import Config
from capfilt.data import images, shards
from capfilt.data.augment import AugmentConfig, augment, generator
from capfilt.data.features import Features
from capfilt.data.order import Order, Span
from capfilt.data.sample import Sample
from capfilt.data.tokens import Tokenizer, clean_caption
from capfilt.errors import DataError, ImageError

KEPT_BYTES = 256 * 2**20
"""Bytes of shards that a loader keeps: all of a small data set, nothing that matters of a large one."""


class Source(Config):
    """Some shards of the training mix."""

    shards: str | tuple[str, ...]
    """What `data/shards.py` can expand: a folder, a glob, braces, a fsspec URL."""
    repeat: float = Field(default=1, gt=0)
    """How often an epoch walks them: a small clean set may count more than once, and of a large one an epoch may take a
    fifth, the next epoch the next fifth (0.2, as BLIP takes LAION)."""


class LoaderConfig(Config):
    """How pairs become batches."""

    batch_size: int = Field(default=64, ge=1)
    """Pairs a step over all ranks."""
    max_length: int = Field(default=30, ge=4)
    """Tokens of a text, with [CLS] and [SEP]; BLIP pretrains with 30."""
    shuffle: int = Field(default=4096, ge=1)
    """Rows held back to draw from, over all ranks; the larger, the better mixed. Encoded images, not pixels."""
    lanes: int = Field(default=16, ge=1)
    """Places of the data that are read side by side, of which ranks take equal parts: as many as ranks, or a multiple.
    Taken down to a divisor of the batch."""
    captions: Literal["all", "one"] = "all"
    """Whether each text of an image is a row, or each image, with one of its texts drawn in every epoch."""
    weights: dict[str, float] = {}
    """For captions "one": how likely a text is drawn by its source ("web", "synthetic", "human"); 1 where not given."""
    decoders: int = Field(default=1, ge=1)
    """Threads of each rank that decode pictures."""
    augment: AugmentConfig = AugmentConfig()
    """What happens to a picture at random; by default nothing."""
    prompt: str = ""
    """What each text begins with, and what LM then does not learn to write. Captioning fine-tuning: "a picture of "."""

    @field_validator("weights")
    @classmethod
    def _positive(cls, weights: dict[str, float]) -> dict[str, float]:
        if wrong := [source for source, weight in weights.items() if not weight > 0]:
            raise ValueError(f"the weight of {wrong[0]!r} is not above 0; leave such texts out when selecting")
        return weights


@dataclass(frozen=True)
class Row:
    """One training pair before decoding."""

    shard: str
    uid: str
    image: bytes
    text: str


@dataclass(frozen=True)
class Batch:
    """What a training step sees."""

    images: Tensor
    """[B, 3, S, S] normalised floats; or [B, N, D], what was kept of the frozen tower."""
    ids: Tensor
    """[B, T], [CLS] first, padded."""
    mask: Tensor
    """[B, T], 1 for text."""
    groups: Tensor
    """[B]: equal numbers are the same image, in other batches and on other ranks too; never negative."""
    uids: tuple[str, ...]
    unreadable: int
    """Rows whose image could not be decoded; other rows of the batch stand in for them."""


class Loader:
    """An endless, seeded stream of batches for one rank of several."""

    def __init__(
        self,
        sources: Sequence[Source],
        config: LoaderConfig,
        tokenizer: Tokenizer,
        image_size: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        rows: Mapping[str, int] | None = None,
        features: Features | None = None,
    ):
        """`rows` says how many rows each shard has; without it they are counted now, which reads every shard once.

        With `features` no picture is decoded: batches have what was kept of each.
        """
        if config.batch_size % ranks:
            raise DataError(
                f"batch_size {config.batch_size} cannot be split over {ranks} ranks; make it a multiple of {ranks}"
            )
        self.config = config
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.seed = seed
        self.features = features
        self.rank, self.ranks = rank, ranks
        walked = [(shards.expand(source.shards), source.repeat) for source in sources]
        if rows is None:
            rows = {url: count(url).of(config.captions) for urls, _ in walked for url in urls}
        self.order = Order(walked, rows, math.gcd(config.lanes, config.batch_size), seed)
        self._kept: dict[str, list[Sample]] = {}
        self._room = KEPT_BYTES

    @property
    def prompt_tokens(self) -> int:
        """How many tokens the prompt is with the [CLS] before it; 0 without a prompt."""
        mask = self.tokenizer.encode([self.config.prompt], self.config.max_length)[1]
        return int(mask.sum()) - 1 if self.config.prompt else 0

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Batches from global step `start` on, without end; decoding runs two batches ahead in a thread."""
        return ahead(self._batches(start))

    def _batches(self, start: int) -> Iterator[Batch]:
        size, lanes = self.config.batch_size, self.order.lanes
        each, own = size // lanes, size // self.ranks
        mine = range(self.rank * own, self.rank * own + own)
        window = max(1, self.config.shuffle // lanes)
        walks = {
            lane: self.order.walk(lane, start * each, window, self._read)
            for lane in range(mine.start // each, (mine.stop - 1) // each + 1)
        }
        step = start
        with ThreadPoolExecutor(self.config.decoders, thread_name_prefix="decode") as pool:
            each_row = pool.map if self.config.decoders > 1 else map
            while True:
                taken = {
                    lane * each + i: row for lane, rows in walks.items() for i, row in enumerate(islice(rows, each))
                }
                rows, first = [taken[i] for i in mine], step * size + mine.start
                yield self._batch(rows, list(each_row(self._pixels, rows, range(first, first + own))))
                step += 1

    def _read(self, epoch: int, span: Span) -> Iterator[Row]:
        """The rows of a span. DataError where the shard has fewer than were counted."""
        found = 0
        for row in islice(self._rows(span.url, epoch), span.first, span.first + span.count):
            found += 1
            yield row
        if found < span.count:
            raise DataError(
                f"{span.url} has {span.first + found} rows, and {self.order.rows[span.url]} were counted: it changed."
                " Training needs shards that stay as they are; begin again in another --out."
            )

    def _rows(self, url: str, epoch: int) -> Iterator[Row]:
        for sample in self._samples(url):
            for caption in sample.captions if self.config.captions == "all" else [self._drawn(sample, epoch)]:
                yield Row(url, sample.uid, sample.image, str(caption["text"]))

    def _samples(self, url: str) -> Iterable[Sample]:
        """The samples of a shard. The first small ones stay in memory: lanes that begin in the middle of a shard, and
        all later epochs, would read it again from its start."""
        if url in self._kept:
            return self._kept[url]
        found = (item for item in shards.read(url) if isinstance(item, Sample))
        size = shards.stat(url)["size"]
        if size is None or size > self._room:
            return found
        self._room -= size
        self._kept[url] = list(found)
        return self._kept[url]

    def _drawn(self, sample: Sample, epoch: int) -> dict[str, Any]:
        """One of an image's texts, for this epoch."""
        captions = sample.captions
        weights = np.array([self.config.weights.get(caption["source"], 1.0) for caption in captions])
        place = generator(self.seed, epoch, sample.uid).random() * weights.sum()
        return captions[min(int(np.searchsorted(weights.cumsum(), place, side="right")), len(captions) - 1)]

    def _batch(self, rows: Sequence[Row], views: Sequence[np.ndarray | Tensor | None]) -> Batch:
        """The batch of `rows`, as they are seen."""
        kept = [row for row, view in zip(rows, views, strict=True) if view is not None]
        pixels = [view for view in views if view is not None]
        if not kept:
            raise DataError(f"none of the {len(rows)} images of a batch can be read, the first of them {rows[0].uid}")
        # The batch keeps its size, on which queues and ranks rely: readable rows stand in again for unreadable ones.
        fill = [i % len(kept) for i in range(len(rows))]
        kept, pixels = [kept[i] for i in fill], [pixels[i] for i in fill]
        texts = [f"{self.config.prompt.strip()} {clean_caption(row.text)}".strip() for row in kept]
        ids, mask = self.tokenizer.encode(texts, self.config.max_length)
        return Batch(
            images=stack(pixels),
            ids=torch.from_numpy(ids),
            mask=torch.from_numpy(mask),
            groups=torch.tensor([number(row.uid) for row in kept]),
            uids=tuple(row.uid for row in kept),
            unreadable=len(rows) - len(set(fill)),
        )

    def _pixels(self, row: Row, place: int) -> np.ndarray | Tensor | None:
        """The picture of row number `place` of the training, uint8 [S, S, 3], or what was kept of it [N, D]; None where
        it cannot be decoded."""
        if self.features is not None:
            return self.features.of(row.shard, row.uid)
        try:
            image = images.decode(row.image)
        except ImageError:
            return None
        return augment(image, self.image_size, self.config.augment, generator(self.seed, place, row.uid))


def stack(views: Sequence[np.ndarray | Tensor]) -> Tensor:
    """Pictures uint8 [S, S, 3] -> [B, 3, S, S] normalised floats; kept features [N, D] -> [B, N, D]."""
    if isinstance(views[0], Tensor):
        return torch.stack([view for view in views if isinstance(view, Tensor)])
    return torch.from_numpy(images.normalise(np.stack([np.asarray(view) for view in views])))


@dataclass(frozen=True)
class Count:
    """How many images of a shard can be trained on, and how many texts they have."""

    images: int
    texts: int

    def of(self, captions: Literal["all", "one"]) -> int:
        """Rows, where each text is one or each image is."""
        return self.texts if captions == "all" else self.images


def count(url: str) -> Count:
    """Read a shard to its end and count. Pictures are not decoded."""
    texts = [len(item.captions) for item in shards.read(url) if isinstance(item, Sample)]
    return Count(len(texts), sum(texts))


def number(uid: str) -> int:
    """63 bits of an image's identity."""
    return int.from_bytes(hashlib.blake2b(uid.encode(), digest_size=8).digest(), "big") >> 1


def ahead(batches: Iterator[Batch], depth: int = 2) -> Iterator[Batch]:
    """Run an iterator in a thread, `depth` items ahead; its exceptions arrive where its items would have.

    Closing it waits for the item that is being made: an interpreter that ends while a thread of it is inside torch
    aborts, and a training that succeeded would leave with 134.
    """
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=depth)
    closed = threading.Event()

    def put(item: Batch | BaseException | None) -> None:
        while not closed.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for batch in batches:
                put(batch)
                if closed.is_set():
                    return
            put(None)
        except BaseException as error:  # noqa: BLE001 handed over, and raised where the batch was expected
            put(error)

    thread = threading.Thread(target=work, daemon=True, name="loader")
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        thread.join()
