"""Batches of (image, text) pairs, streamed from shards in an order that is a function of the seed.

Every text of an image is a row of its own (BLIP counts so: COCO's five captions are five rows). The position in the
data is one number, the global rows taken so far: any number of ranks started at that row goes on with exactly the rows
that come next. All ranks walk the same stream and decode only their own rows, so no rank starves when shards are few.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from capfilt.config import Config
from capfilt.data import images, shards
from capfilt.data.augment import AugmentConfig, augment, generator
from capfilt.data.sample import Sample
from capfilt.data.tokens import Tokenizer, clean_caption
from capfilt.errors import DataError, ImageError


class Source(Config):
    """Some shards of the training mix."""

    shards: str | tuple[str, ...]
    """What `data/shards.py` can expand: a folder, a glob, braces, a fsspec URL."""
    repeat: int = Field(default=1, ge=1)
    """How often an epoch walks them: a small clean set may count more than once."""


class LoaderConfig(Config):
    """How pairs become batches."""

    batch_size: int = Field(default=64, ge=1)
    """Pairs a step over all ranks."""
    max_length: int = Field(default=30, ge=4)
    """Tokens of a text, with [CLS] and [SEP]; BLIP pretrains with 30."""
    shuffle: int = Field(default=4096, ge=1)
    """Rows held back to draw from; the larger, the better mixed. They are encoded images, not pixels."""
    augment: AugmentConfig = AugmentConfig()
    """What happens to a picture at random; by default nothing."""
    prompt: str = ""
    """What each text begins with, and what LM then does not learn to write. Captioning fine-tuning: "a picture of "."""


@dataclass(frozen=True)
class Row:
    """One training pair before decoding."""

    uid: str
    image: bytes
    text: str


@dataclass(frozen=True)
class Batch:
    """What a training step sees."""

    images: Tensor
    """[B, 3, S, S] normalised floats."""
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
    ):
        if config.batch_size % ranks:
            raise DataError(
                f"batch_size {config.batch_size} cannot be split over {ranks} ranks; make it a multiple of {ranks}"
            )
        self.config = config
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.seed = seed
        self.rank, self.ranks = rank, ranks
        self.shards = [url for source in sources for url in shards.expand(source.shards) * source.repeat]

    @property
    def prompt_tokens(self) -> int:
        """How many tokens the prompt is with the [CLS] before it; 0 without a prompt."""
        mask = self.tokenizer.encode([self.config.prompt], self.config.max_length)[1]
        return int(mask.sum()) - 1 if self.config.prompt else 0

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Batches from global step `start` on, without end; decoding runs one batch ahead in a thread."""
        rows = islice(self._rows(), start * self.config.batch_size, None)
        own = self.config.batch_size // self.ranks
        mine = slice(self.rank * own, (self.rank + 1) * own)

        def make() -> Iterator[Batch]:
            step = start
            while taken := list(islice(rows, self.config.batch_size)):
                yield self._batch(taken[mine], step * self.config.batch_size + mine.start)
                step += 1

        return ahead(make())

    def _rows(self) -> Iterator[Row]:
        """All rows of epoch after epoch, shuffled through a bounded buffer."""
        epoch = 0
        while True:
            random = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            order = random.permutation(len(self.shards))
            count = 0
            for row in shuffled(self._read([self.shards[i] for i in order]), self.config.shuffle, random):
                count += 1
                yield row
            if count == 0:
                raise DataError(f"no readable pair in {len(self.shards)} shards, first {self.shards[0]}")
            epoch += 1

    def _read(self, urls: Sequence[str]) -> Iterator[Row]:
        for url in urls:
            for item in shards.read(url):
                if isinstance(item, Sample):
                    for caption in item.captions:
                        yield Row(item.uid, item.image, str(caption["text"]))

    def _batch(self, rows: Sequence[Row], first: int) -> Batch:
        """The batch of `rows`, of which the first is row number `first` of the training."""
        kept, pixels = decoded(rows, self.image_size, self.config.augment, self.seed, first)
        if not kept:
            raise DataError(f"none of the {len(rows)} images of a batch can be read, the first of them {rows[0].uid}")
        # The batch keeps its size, on which queues and ranks rely: readable rows stand in again for unreadable ones.
        fill = [i % len(kept) for i in range(len(rows))]
        kept, pixels = [kept[i] for i in fill], [pixels[i] for i in fill]
        texts = [f"{self.config.prompt.strip()} {clean_caption(row.text)}".strip() for row in kept]
        ids, mask = self.tokenizer.encode(texts, self.config.max_length)
        return Batch(
            images=torch.from_numpy(images.normalise(np.stack(pixels))),
            ids=torch.from_numpy(ids),
            mask=torch.from_numpy(mask),
            groups=torch.tensor([number(row.uid) for row in kept]),
            uids=tuple(row.uid for row in kept),
            unreadable=len(rows) - len(set(fill)),
        )


def number(uid: str) -> int:
    """63 bits of an image's identity."""
    return int.from_bytes(hashlib.blake2b(uid.encode(), digest_size=8).digest(), "big") >> 1


def decoded(
    rows: Sequence[Row], size: int, views: AugmentConfig, seed: int, first: int
) -> tuple[list[Row], list[np.ndarray]]:
    """Rows with their pixels [size, size, 3]; a row that cannot be decoded is left out."""
    kept, pixels = [], []
    for place, row in enumerate(rows, first):
        try:
            image = images.decode(row.image)
        except ImageError:
            continue  # counted by the caller as the difference
        pixels.append(augment(image, size, views, generator(seed, place, row.uid)))
        kept.append(row)
    return kept, pixels


def shuffled(rows: Iterator[Row], size: int, random: np.random.Generator) -> Iterator[Row]:
    """Draw from a buffer of up to `size` rows that is refilled as it is drawn from."""
    buffer: list[Row] = []
    for row in rows:
        if len(buffer) < size:
            buffer.append(row)
            continue
        i = int(random.integers(size))
        buffer[i], row = row, buffer[i]
        yield row
    for i in random.permutation(len(buffer)):
        yield buffer[i]


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
