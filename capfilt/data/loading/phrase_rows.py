"""Batches of phrases that say where something is: pictures, each with a text and its box.

`augment.crop` keeps a phrase's box in the picture: its share of the area is not looked at, and any crop around the box
is as likely as any other (X-VLM's fine-tuning for RefCOCO+). Pictures of texts that say left or right are not mirrored.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from capfilt.data.images import decode as images
from capfilt.data.images.augment import generator
from capfilt.data.loading.loader import Batch, Loader
from capfilt.data.loading.order import Span
from capfilt.data.loading.rows import Row, RowReader, count_pairs
from capfilt.data.loading.task_texts import phrases_of
from capfilt.data.regions import REGIONS, Region, regions_of
from capfilt.data.sample import Sample
from capfilt.errors import DataError, ImageError

Box = tuple[float, float, float, float]
"""Center x, center y, width, height, in shares of the picture."""


@dataclass(frozen=True)
class PhraseRow(Row):
    """A phrase and its picture, before it is decoded; only then it is known whether the box lies in it."""

    entry: Any
    """The region as the json has it."""


@dataclass(frozen=True)
class PhraseRows(Batch):
    """What a step is given."""

    boxes: Tensor
    """[B, 4]: center x, center y, width, height, in shares of the picture."""


class View(NamedTuple):
    """A picture as the model sees it, uint8 [H, W, 3], and where in it the phrase is."""

    pixels: np.ndarray
    box: Box


class PhraseReader(RowReader):
    """Reads the phrases that spans of shards have."""

    def _rows(self, span: Span, epoch: int) -> Iterator[Row]:
        for sample in self._samples(span.url):
            for entry in phrases_of(sample.meta):
                yield PhraseRow(span.url, sample.uid, sample.image, str(entry["text"]), entry)

    def _has_rows(self, sample: Sample) -> bool:
        return bool(phrases_of(sample.meta))


class PhraseLoader(Loader):
    """An endless, seeded stream of batches of phrases for one rank of several."""

    def __init__(self, *args: Any, **options: Any):
        """As `Loader`. DataError for an augmentation that moves what is in a picture, and not its box."""
        super().__init__(*args, **options)
        if self.config.augment.randaugment is not None:
            raise DataError(
                "loader.augment.randaugment turns and moves pictures, and boxes would stay: leave it out for grounding"
            )
        self._reader = PhraseReader(self.config.captions, {}, self.seed, self.order.rows)
        self._warned = False

    def _count(self, url: str) -> int:
        return count_pairs(url).of_tasks["phrases"]

    def _view(self, row: Row, number: int) -> Any:
        """The picture of a phrase, and its box; None where one of them cannot be used."""
        assert isinstance(row, PhraseRow)
        try:
            picture = images.decode(row.image)
            (region,) = regions_of({REGIONS: [row.entry]}, *picture.size)
        except ImageError:
            return None
        except DataError as error:
            if not self._warned:
                logging.getLogger(__name__).warning(
                    "%s: %s: %s; such a phrase is left out", row.shard, row.uid, str(error).removeprefix("region 0: ")
                )
            self._warned = True
            return None
        return self._drawn(picture, region, generator(self.seed, "phrases", number, row.uid))

    def _drawn(self, picture: Image.Image, region: Region, rng: np.random.Generator) -> View:
        """The picture, or a random crop with all of a region in it, mirrored or not."""
        assert self.image_format is not None, "phrases are about pictures"
        config, (width, height) = self.config.augment, picture.size
        left, top, right, bottom = 0, 0, width, height
        if config.crop is not None:
            left, top = (int(rng.integers(math.floor(edge) + 1)) for edge in (region.left, region.top))
            right = int(rng.integers(min(math.ceil(region.left + region.width), width), width + 1))
            bottom = int(rng.integers(min(math.ceil(region.top + region.height), height), height + 1))
        pixels = self.image_format.crop_to_pixels(picture.crop((left, top, right, bottom)))
        wide, high = right - left, bottom - top
        x, y = (region.left + region.width / 2 - left) / wide, (region.top + region.height / 2 - top) / high
        sided = any(side in region.text.lower() for side in ("left", "right"))
        if config.flip and not sided and rng.random() < 0.5:
            pixels, x = np.ascontiguousarray(pixels[:, ::-1]), 1 - x
        return View(pixels, (x, y, region.width / wide, region.height / high))

    def _made(self, rows: Sequence[Row], views: Sequence[Any], unreadable: int) -> Batch:
        batch = super()._made(rows, [view.pixels for view in views], unreadable)
        boxes = torch.tensor([view.box for view in views], dtype=torch.float32)
        return PhraseRows(**{field.name: getattr(batch, field.name) for field in fields(Batch)}, boxes=boxes)
