"""Batches of (image, text) pairs, streamed from shards in an order that is a function of the seed.

The position in the data is one number, the step: any number of ranks started there goes on with exactly the rows that
come next (`order.py`).
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice

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

MAX_UNREADABLE = 1000
"""Rows behind a batch none of whose pictures can be decoded that are searched for one that can."""

NO_PICTURE = np.empty(0, np.uint8)


@dataclass(frozen=True)
class Batch:
    """What a training step is given."""

    images: Tensor
    """[B, 3, H, W] normalised floats (padded ones [B, 4, H, W], `Preprocess.stack`); or [B, N, D], the kept features of
    a frozen vision tower; or [B, 0] where no pictures are read."""
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
        self.pinned = False
        """Whether pictures are put into pinned memory, from which a GPU copies them while it computes."""
        if rows is None:
            walked = [(shards.expand(source.shards), source.repeat) for source in sources]
            rows = {url: self._count(url) for urls, _ in walked for url in urls}
        else:
            walked = [(_expanded(source.shards, rows), source.repeat) for source in sources]
        self.order = RowOrder(walked, rows, math.gcd(config.lanes, config.batch_size), seed)
        self._reader = RowReader(config.captions, config.weights, seed, rows)

    def _count(self, url: str) -> int:
        return count_pairs(url).num_rows(self.config.captions)

    @property
    def prompt_tokens(self) -> int:
        """How many tokens the prompt is with the [CLS] before it; 0 without a prompt."""
        mask = self.tokenizer.encode([self.config.prompt], self.config.max_length)[1]
        return int(mask.sum()) - 1 if self.config.prompt else 0

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Batches from global step `start` on, without end; a thread makes them two ahead.

        Raises:
            DataError: a shard has fewer rows than were counted, or no picture near by can be decoded.
            StorageError: a shard's storage failed again and again.
        """
        made, self._reader.closed = self._batches(start), threading.Event()
        if self.pinned:
            made = (replace(batch, images=batch.images.pin_memory()) for batch in made)
        return prefetched(made, self._reader.closed)

    def _batches(self, start: int) -> Iterator[Batch]:
        size, lanes = self.config.batch_size, self.order.lanes
        per_lane, per_rank = size // lanes, size // self.world_size
        mine = range(self.rank * per_rank, (self.rank + 1) * per_rank)  # of the positions in a global batch
        lane_rows = self._lane_rows(range(mine.start // per_lane, (mine.stop - 1) // per_lane + 1), start * per_lane)
        step = start
        decoders = self.config.decoders or torch.get_num_threads()
        with ThreadPoolExecutor(decoders, thread_name_prefix="decode") as pool:
            map_rows = pool.map if decoders > 1 else map
            while True:
                taken: dict[int, Row] = {}
                for lane, following in lane_rows.items():
                    taken |= enumerate(following.take(per_lane), lane * per_lane)
                rows, first = [taken[i] for i in mine], step * size + mine.start
                views = list(map_rows(self._view, rows, range(first, first + per_rank)))
                unreadable = sum(view is None for view in views)
                if unreadable == per_rank:
                    rows, views = self._first_readable(next(iter(lane_rows.values())), rows, first)
                yield self._batch(rows, views, per_rank, unreadable)
                step += 1

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
            image = images.decode(row.image)
            return augment(image, self.image_format, self._changes(row), generator(self.seed, number, row.uid))
        except ImageError:
            return None

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
        """Pictures uint8 [H, W, 3] -> [B, 3, H, W] normalised floats; features [N, D] -> [B, N, D]."""
        if isinstance(views[0], Tensor):
            return torch.stack([view for view in views if isinstance(view, Tensor)])
        if self.image_format is None:
            return torch.empty(len(views), 0)
        rule = self.image_format.preprocess
        return rule.normalise(rule.stack([np.asarray(view) for view in views]))


def _expanded(spec: str | Sequence[str], rows: Mapping[str, int]) -> list[str]:
    """The shards of `spec`. Where `rows` has all that it names, they are not looked up: each rank would ask a store for
    each of 100,000."""
    urls = [spec] if isinstance(spec, str) else list(spec)
    return urls if all(url in rows for url in urls) else shards.expand(spec)


def image_id(uid: str) -> int:
    """63 bits of an image's identity."""
    return int.from_bytes(hashlib.blake2b(uid.encode(), digest_size=8).digest(), "big") >> 1
