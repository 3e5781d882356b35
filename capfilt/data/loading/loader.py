"""Batches of (image, text) pairs, streamed from shards in an order that is a function of the seed.

Every text of an image is a row of its own (BLIP counts so: COCO's five captions are five rows), or every image is one,
with a text drawn anew in each epoch (BLIP-2). The position in the data is one number, the step: any number of ranks
started there goes on with exactly the rows that come next (`order.py`).
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from capfilt.config import Config
from capfilt.data import shards
from capfilt.data.images import decode as images
from capfilt.data.images.augment import AugmentConfig, augment, generator
from capfilt.data.loading.features import Features
from capfilt.data.loading.order import Order, Span
from capfilt.data.sample import Sample
from capfilt.data.shards.members import Members
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.errors import DataError, ImageError, StorageError

PAUSES = (1, 5, 30, 120, 300)
"""Seconds between tries to go on with a shard whose storage failed."""
STAND_INS = 1000
"""Rows that are looked through for one that can be read, where none of a batch can."""
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
    decoders: int = Field(default=0, ge=0)
    """Threads of each rank that decode pictures; 0 = as many as it computes with."""
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
    image_ids: Tensor
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
        world_size: int = 1,
        rows: Mapping[str, int] | None = None,
        features: Features | None = None,
    ):
        """`rows` says how many rows each shard has; without it they are counted now, which reads every shard once.

        With `features` no picture is decoded: batches have what was kept of each.
        """
        if config.batch_size % world_size:
            raise DataError(
                f"batch_size {config.batch_size} cannot be split over {world_size} ranks; make it a multiple of"
                f" {world_size}"
            )
        self.config = config
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.seed = seed
        self.features = features
        self.rank, self.world_size = rank, world_size
        self.pinned = False
        """Whether pictures are put where a GPU fetches them from while it computes."""
        if rows is None:
            walked = [(shards.expand(source.shards), source.repeat) for source in sources]
            rows = {url: count(url).of(config.captions) for urls, _ in walked for url in urls}
        else:
            walked = [(listed(source.shards, rows), source.repeat) for source in sources]
        self.order = Order(walked, rows, math.gcd(config.lanes, config.batch_size), seed)
        self._kept: dict[str, list[Sample]] = {}
        self._room = KEPT_BYTES
        self._closed = threading.Event()

    @property
    def prompt_tokens(self) -> int:
        """How many tokens the prompt is with the [CLS] before it; 0 without a prompt."""
        mask = self.tokenizer.encode([self.config.prompt], self.config.max_length)[1]
        return int(mask.sum()) - 1 if self.config.prompt else 0

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Batches from global step `start` on, without end; decoding runs two batches ahead in a thread."""
        made, self._closed = self._batches(start), threading.Event()
        if self.pinned:
            made = (replace(batch, images=batch.images.pin_memory()) for batch in made)
        return ahead(made, self._closed)

    def _batches(self, start: int) -> Iterator[Batch]:
        size, lanes = self.config.batch_size, self.order.lanes
        each, own = size // lanes, size // self.world_size
        mine = range(self.rank * own, self.rank * own + own)
        window = max(1, self.config.shuffle // lanes)
        walks = {
            lane: Walk(self.order.walk(lane, start * each, window, self._read))
            for lane in range(mine.start // each, (mine.stop - 1) // each + 1)
        }
        step = start
        decoders = self.config.decoders or torch.get_num_threads()
        with ThreadPoolExecutor(decoders, thread_name_prefix="decode") as pool:
            each_row = pool.map if decoders > 1 else map
            while True:
                taken = {lane * each + i: row for lane, walk in walks.items() for i, row in enumerate(walk.take(each))}
                rows, first = [taken[i] for i in mine], step * size + mine.start
                views = list(each_row(self._pixels, rows, range(first, first + own)))
                unreadable = sum(view is None for view in views)
                if unreadable == own:
                    rows, views = self._stand_in(next(iter(walks.values())), rows, first)
                yield self._batch(rows, views, own, unreadable)
                step += 1

    def _stand_in(self, walk: Walk, rows: list[Row], place: int) -> tuple[list[Row], list[np.ndarray | Tensor | None]]:
        """The next row that can be read, where none of `rows` can: the same one whenever the training is begun again.

        Raises DataError where there is none near by: that is no accident.
        """
        for row in islice(walk.later(), STAND_INS):
            if (view := self._pixels(row, place)) is not None:
                return [row], [view]
        raise DataError(
            f"none of {len(rows) + STAND_INS} images in a row can be read, the first of them {rows[0].uid} in "
            f"{rows[0].shard}"
        )

    def _read(self, epoch: int, span: Span) -> Iterator[Row]:
        """The rows of a span; where storage fails, it is asked again. DataError where the shard has fewer than were
        counted."""
        found, failed, pauses = 0, 0, iter(PAUSES)
        while True:
            rows = self._rows(span, epoch)
            try:
                for row in islice(rows, span.first + found, span.first + span.count):
                    found += 1
                    yield row
                break
            except StorageError as error:
                failed, pauses = found, (iter(PAUSES) if found > failed else pauses)
                if (pause := next(pauses, None)) is None:
                    raise
                logging.getLogger(__name__).warning("%s; again in %d s", error, pause)
                if self._closed.wait(pause):  # nobody wants it any more
                    raise
        if found < span.count:
            raise DataError(
                f"{span.url} has {span.first + found} rows, and {self.order.rows[span.url]} were counted: it changed."
                " Training needs shards that stay as they are; begin again in another --out."
            )

    def _rows(self, span: Span, epoch: int) -> Iterator[Row]:
        """All rows of the shard that a span is of."""
        for sample in self._samples(span.url):
            drawn = sample.captions if self.config.captions == "all" else [self._drawn(sample, epoch, span.turn)]
            for caption in drawn:
                yield Row(span.url, sample.uid, sample.image, str(caption["text"]))

    def _samples(self, url: str) -> Iterable[Sample]:
        """The samples of a shard that have a text. The first small shards stay in memory: lanes that begin in the
        middle of a shard, and all later epochs, would read it again from its start."""
        if url in self._kept:
            return self._kept[url]
        found = (item for item in shards.read(url) if isinstance(item, Sample) and item.captions)
        size = shards.stat(url)["size"]
        if size is None or size > self._room:
            return found
        self._kept[url] = list(found)
        self._room -= size
        return self._kept[url]

    def _drawn(self, sample: Sample, epoch: int, turn: int) -> dict[str, Any]:
        """One of an image's texts, for this epoch; another draw where it has the shard again."""
        captions = sample.captions
        weights = np.array([self.config.weights.get(caption["source"], 1.0) for caption in captions])
        again = (turn,) if turn else ()
        place = generator(self.seed, epoch, *again, sample.uid).random() * weights.sum()
        return captions[min(int(np.searchsorted(weights.cumsum(), place, side="right")), len(captions) - 1)]

    def _batch(
        self, rows: Sequence[Row], views: Sequence[np.ndarray | Tensor | None], size: int, unreadable: int
    ) -> Batch:
        """A batch of this size of `rows`, as they are seen."""
        kept = [row for row, view in zip(rows, views, strict=True) if view is not None]
        pixels = [view for view in views if view is not None]
        # The batch keeps its size, on which queues and ranks rely: readable rows stand in again for unreadable ones.
        fill = [i % len(kept) for i in range(size)]
        kept, pixels = [kept[i] for i in fill], [pixels[i] for i in fill]
        texts = [f"{self.config.prompt.strip()} {self.tokenizer.clean(row.text)}".strip() for row in kept]
        ids, mask = self.tokenizer.encode(texts, self.config.max_length)
        return Batch(
            images=stack(pixels),
            ids=torch.from_numpy(ids),
            mask=torch.from_numpy(mask),
            image_ids=torch.tensor([number(row.uid) for row in kept]),
            uids=tuple(row.uid for row in kept),
            unreadable=unreadable,
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


class Walk:
    """The rows of a lane, of which the next may be looked at before they are taken."""

    def __init__(self, rows: Iterator[Row]):
        self._rows, self._seen = rows, deque[Row]()

    def take(self, count: int) -> list[Row]:
        """The next rows."""
        return [self._seen.popleft() if self._seen else next(self._rows) for _ in range(count)]

    def later(self) -> Iterator[Row]:
        """The rows that will be taken next, which stay where they are."""
        for i in itertools.count():
            if i == len(self._seen):
                self._seen.append(next(self._rows))
            yield self._seen[i]


def listed(spec: str | Sequence[str], rows: Mapping[str, int]) -> list[str]:
    """The shards of `spec`, which are looked for only if they are not all named in `rows`: of 100,000 that a store has,
    each rank would ask for each."""
    urls = [spec] if isinstance(spec, str) else list(spec)
    return urls if all(url in rows for url in urls) else shards.expand(spec)


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
    without_text: int = 0
    """Images beside these that have no text (`sample.is_text`): there is nothing to train on."""

    def of(self, captions: Literal["all", "one"]) -> int:
        """Rows, where each text is one or each image is."""
        return self.texts if captions == "all" else self.images


def count(url: str, digest: shards.Digest | None = None, members: Members | None = None) -> Count:
    """Read a shard to its end and count, also its `members`. Pictures are not decoded."""
    texts = [len(item.captions) for item in shards.read(url, digest, members) if isinstance(item, Sample)]
    return Count(sum(map(bool, texts)), sum(texts), texts.count(0))


def number(uid: str) -> int:
    """63 bits of an image's identity."""
    return int.from_bytes(hashlib.blake2b(uid.encode(), digest_size=8).digest(), "big") >> 1


def ahead(batches: Iterator[Batch], closed: threading.Event, depth: int = 2) -> Iterator[Batch]:
    """Run an iterator in a thread, `depth` items ahead; its exceptions arrive where its items would have. `closed` is
    set when nobody wants more.

    Closing it waits for the item that is being made: an interpreter that ends while a thread of it is inside torch
    aborts, and a training that succeeded would leave with 134.
    """
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=depth)

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
