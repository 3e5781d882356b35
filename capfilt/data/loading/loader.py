"""Batches of (image, text) pairs, streamed from shards in an order that is a function of the seed.

The position in the data is one number, the step: any number of ranks started there goes on with exactly the rows that
come next (`order.py`).
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, fields, replace
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from capfilt.data import shards
from capfilt.data.images import decode as images
from capfilt.data.images.augment import AugmentConfig, augment, generator
from capfilt.data.images.preprocess import ImageFormat
from capfilt.data.loading.config import LoaderConfig, Source
from capfilt.data.loading.features import Features
from capfilt.data.loading.order import RowOrder
from capfilt.data.loading.prefetch import prefetched
from capfilt.data.loading.rows import LaneRows, Row, RowReader, count_pairs
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.errors import DataError, ImageError

KEPT_PIXELS = 64 * 2**20
"""Bytes of decoded pictures that a loader keeps: all of a small data set of small pictures."""

MAX_UNREADABLE = 1000
"""Rows behind a batch none of whose pictures can be decoded that are searched for one that can."""

AHEAD = 2
"""Batches that are made before they are asked for."""

NO_PICTURE = np.empty(0, np.uint8)


@dataclass(frozen=True)
class Batch:
    """What a training step is given."""

    images: Tensor
    """[B, 3, H, W] normalised floats (padded ones [B, 4, H, W], `Preprocess.stack`) on the loader's device; or [B, N,
    D], the kept features of a frozen vision tower, there too; or [B, 0] where no pictures are read."""
    ids: Tensor
    """Token ids [B, T], [CLS] first, padded."""
    mask: Tensor
    """[B, T], 1 for text, 0 for padding."""
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
        image_format: ImageFormat | int | None,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        rows: Mapping[str, int] | None = None,
    ):
        """Args:
            image_format: the pictures that the model reads; a number: BLIP's of that size; None: it reads none.
            rows: the number of rows of each shard, by its url; None: they are counted now, by reading every shard once.

        Raises:
            DataError: `batch_size` is no multiple of `world_size`, or there is no readable pair.
        """
        if config.batch_size % world_size:
            raise DataError(
                f"batch_size {config.batch_size} cannot be split over {world_size} ranks; make it a multiple of"
                f" {world_size}"
            )
        self.config = config
        self.tokenizer = tokenizer
        self.image_format = ImageFormat(image_format) if isinstance(image_format, int) else image_format
        self.seed = seed
        self.rank, self.world_size = rank, world_size
        self.features: Features | None = None
        """What a frozen vision tower gave for each picture; batches have it in place of pictures."""
        self.device = torch.device("cpu")
        """Where pictures are wanted. A GPU copies their bytes out of pinned memory and normalises them itself."""
        if rows is None:
            walked = [(shards.expand(source.shards), source.repeat) for source in sources]
            rows = {url: self._count(url) for urls, _ in walked for url in urls}
        else:
            walked = [(_expanded(source.shards, rows), source.repeat) for source in sources]
        self.order = RowOrder(walked, rows, math.gcd(config.lanes, config.batch_size), seed)
        self._reader = RowReader(config.captions, config.weights, seed, rows)
        self._pixels: dict[bytes, np.ndarray] = {}
        self._room = KEPT_PIXELS

    def _count(self, url: str) -> int:
        return count_pairs(url).num_rows(self.config.captions)

    @property
    def prompt_tokens(self) -> int:
        """How many tokens the prompt is with the [CLS] before it; 0 without a prompt."""
        mask = self.tokenizer.encode([self.config.prompt], self.config.max_length)[1]
        return int(mask.sum()) - 1 if self.config.prompt else 0

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Batches from global step `start` on, without end; threads make them, two ahead.

        Raises:
            DataError: a shard has fewer rows than were counted, or no picture near by can be decoded.
            StorageError: a shard's storage failed again and again.
        """
        self._reader.closed = threading.Event()
        made = freed_here(self._readied(batch) for batch in self._batches(start))
        with closing(prefetched(made, self._reader.closed, AHEAD)) as ready:
            for batch in ready:
                yield self._arrived(batch)

    def _batches(self, start: int) -> Iterator[Batch]:
        """Batches whose pictures are bytes; while one is made, the rows of the next are read and decoded."""
        size, lanes = self.config.batch_size, self.order.lanes
        per_lane, per_rank = size // lanes, size // self.world_size
        mine = range(self.rank * per_rank, (self.rank + 1) * per_rank)  # of the positions in a global batch
        lane_rows = self._lane_rows(range(mine.start // per_lane, (mine.stop - 1) // per_lane + 1), start * per_lane)
        decoders = self.config.decoders or torch.get_num_threads()
        with _executor(1, "rows") as reader, _executor(decoders, "decode") as pool:
            map_rows = pool.map if decoders > 1 else map

            def begin(step: int) -> tuple[list[Row], Iterator[Any]]:
                ahead: dict[int, Row] = {}
                for lane, following in lane_rows.items():
                    ahead |= enumerate(islice(following.peek(), per_lane), lane * per_lane)
                rows, first = [ahead[i] for i in mine], step * size + mine.start
                return rows, map_rows(self._view, rows, range(first, first + per_rank))

            begun = reader.submit(begin, start)
            for step in count(start):
                rows, decoding = begun.result()
                for following in lane_rows.values():
                    following.take(per_lane)
                begun = reader.submit(begin, step + 1)
                views = list(decoding)
                unreadable = sum(view is None for view in views)
                if unreadable == per_rank:
                    begun.result()  # until then the lanes are the reader's
                    rows, views = self._first_readable(next(iter(lane_rows.values())), rows, step * size + mine.start)
                yield self._batch(rows, views, per_rank, unreadable)

    def _lane_rows(self, lanes: range, position: int) -> dict[int, LaneRows]:
        """The rows of these lanes from a position on."""
        window = max(1, self.config.shuffle // self.order.lanes)
        return {lane: LaneRows(self.order.walk(lane, position, window, self._reader.read)) for lane in lanes}

    def _view(self, row: Row, number: int) -> np.ndarray | Tensor | None:
        """The picture of row number `number` of the training, uint8 [H, W, 3], or its features [N, D]; None where it
        cannot be decoded."""
        if self.features is not None:
            return self.features.of(row.shard, row.uid)
        if self.image_format is None:
            return NO_PICTURE
        try:
            changes = self._changes(row)
            if not changes.at_random:
                return self._unchanged(row.image, self._reader.keeps(row.shard))
            image = images.decode(row.image)
            return augment(image, self.image_format, changes, generator(self.seed, number, row.uid))
        except ImageError:
            return None

    def _unchanged(self, data: bytes, stays: bool) -> np.ndarray:
        """The pixels of a picture to which nothing happens; of one that stays in memory they do too, as far as there
        is room."""
        assert self.image_format is not None, "whoever reads no pictures asks for none"
        if stays and (kept := self._pixels.get(data)) is not None:
            return kept
        pixels = self.image_format.to_pixels(images.decode(data))
        if stays and pixels.nbytes <= self._room:
            self._pixels[data] = pixels
            self._room -= pixels.nbytes
        return pixels

    def _changes(self, row: Row) -> AugmentConfig:
        """What happens to the picture of a row at random."""
        return self.config.augment

    def _first_readable(
        self, following: LaneRows, rows: list[Row], number: int
    ) -> tuple[list[Row], list[np.ndarray | Tensor | None]]:
        """The next row whose picture can be decoded, where none of `rows` can: the same one in every run.

        Raises DataError where there is none among MAX_UNREADABLE rows, which cannot be chance.
        """
        for row in islice(following.peek(), MAX_UNREADABLE):
            if (view := self._view(row, number)) is not None:
                return [row], [view]
        raise DataError(
            f"none of {len(rows) + MAX_UNREADABLE} images in a row can be read, the first of them {rows[0].uid} in "
            f"{rows[0].shard}"
        )

    def _batch(
        self, rows: Sequence[Row], views: Sequence[np.ndarray | Tensor | None], size: int, unreadable: int
    ) -> Batch:
        """Make a batch of `size` rows; readable ones are repeated in place of unreadable ones."""
        readable = [(row, view) for row, view in zip(rows, views, strict=True) if view is not None]
        # The batch keeps its size, on which queues and ranks rely.
        repeated = [readable[i % len(readable)] for i in range(size)]
        return self._made([row for row, _ in repeated], [view for _, view in repeated], unreadable)

    def _made(self, rows: Sequence[Row], views: Sequence[np.ndarray | Tensor], unreadable: int) -> Batch:
        """A batch of rows whose pictures were decoded."""
        texts = [f"{self.config.prompt.strip()} {self.tokenizer.clean(row.text)}".strip() for row in rows]
        ids, mask = self.tokenizer.encode(texts, self.config.max_length)
        return Batch(
            images=self._stack(views),
            ids=torch.from_numpy(ids),
            mask=torch.from_numpy(mask),
            image_ids=torch.tensor([image_id(row.uid) for row in rows]),
            uids=tuple(row.uid for row in rows),
            unreadable=unreadable,
        )

    def _stack(self, views: Sequence[np.ndarray | Tensor]) -> Tensor:
        """Pictures uint8 [H, W, 3] -> [B, H, W, 3]; features [N, D] -> [B, N, D]."""
        if isinstance(views[0], Tensor):
            return torch.stack([view for view in views if isinstance(view, Tensor)])
        if self.image_format is None:
            return torch.empty(len(views), 0)
        return self.image_format.preprocess.stack([np.asarray(view) for view in views])

    # ---- from bytes in memory to pictures on the device ----

    def _readied(self, batch: Batch) -> Batch:
        """In the loader's thread, all that the host has to do: pin what a GPU is to copy, or else normalise here."""
        if self.device.type == "cpu":
            return self._normalised(batch)
        values = {each.name: getattr(batch, each.name) for each in fields(batch)}
        pinned: Any = {name: value.pin_memory() for name, value in values.items() if isinstance(value, Tensor)}
        return replace(batch, **pinned)

    def _arrived(self, batch: Batch) -> Batch:
        """In the thread that computes; a GPU is told what to do with the pictures, and the host goes on."""
        if self.device.type == "cpu":
            return batch
        return self._normalised(replace(batch, images=batch.images.to(self.device, non_blocking=True)))

    def _normalised(self, batch: Batch) -> Batch:
        if self.image_format is None or batch.images.dtype != torch.uint8:
            return batch
        return replace(batch, images=self.image_format.preprocess.normalise(batch.images))


def freed_here(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Batches whose memory the loader's thread gives back: at 384 px that takes longer than all else that the thread
    which computes has to do with a batch. Each is held until that thread must have let go of it."""
    held: deque[Batch] = deque(maxlen=AHEAD + 3)
    for batch in batches:
        held.append(batch)
        yield batch


def _executor(threads: int, name: str) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix=name)


def _expanded(spec: str | Sequence[str], rows: Mapping[str, int]) -> list[str]:
    """The shards of `spec`. Where `rows` has all that it names, they are not looked up: each rank would ask a store for
    each of 100,000."""
    urls = [spec] if isinstance(spec, str) else list(spec)
    return urls if all(url in rows for url in urls) else shards.expand(spec)


def image_id(uid: str) -> int:
    """63 bits of an image's identity."""
    return int.from_bytes(hashlib.blake2b(uid.encode(), digest_size=8).digest(), "big") >> 1
