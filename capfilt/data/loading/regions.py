"""Batches of regions: parts of pictures with texts of their own, and whole pictures with theirs.

As X-VLM makes them: a crop around one region of a picture, mirrored or not, squashed to the square; of the other
regions those that lie in the crop for the most part. Every rank has the same number of texts: some are left out, or
come twice.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from capfilt.data import shards
from capfilt.data.images import decode as images
from capfilt.data.images.augment import COLOURS, generator, randaugment
from capfilt.data.images.preprocess import ImageFormat
from capfilt.data.loading.config import RegionConfig, Source
from capfilt.data.loading.loader import Batch, Loader, image_id
from capfilt.data.loading.order import Span
from capfilt.data.loading.rows import Row, RowReader, count_pairs
from capfilt.data.regions import Region, has_regions, regions_of
from capfilt.data.sample import Sample
from capfilt.errors import DataError, ImageError

WHOLE = (0.5, 0.5, 1.0, 1.0)
"""The box of a whole picture: center x, center y, width, height, in shares."""


@dataclass(frozen=True)
class RegionRows(Batch):
    """What a step on regions is given: `images` are B pictures, and all else has a row for each of R texts."""

    image: Tensor
    """[R]: the number of each text's picture."""
    seen: Tensor
    """[R, 1 + patches]: 1 for the patches that are in the region, and for [CLS], the first."""
    boxes: Tensor
    """[R, 4]: center x, center y, width, height, in shares of the picture."""
    is_region: Tensor
    """[R]: False for texts of whole pictures."""


@dataclass(frozen=True)
class RegionRow(Row):
    """A picture with regions, before it is decoded; `text` is one of the whole picture, or ""."""

    meta: Mapping[str, object]


class Part(NamedTuple):
    """A text with its part of a picture as the model sees it."""

    text: str
    box: tuple[float, float, float, float]
    seen: np.ndarray


class View(NamedTuple):
    """A picture as the model sees it, uint8 [H, W, 3], with its texts."""

    pixels: np.ndarray
    parts: list[Part]


class RegionReader(RowReader):
    """Reads the pictures of spans of shards that have regions."""

    def _rows(self, span: Span, epoch: int) -> Iterator[Row]:
        for sample in self._samples(span.url):
            text = str(self._draw(sample, epoch, span.repetition)["text"]) if sample.captions else ""
            yield RegionRow(span.url, sample.uid, sample.image, text, sample.meta)

    def _has_rows(self, sample: Sample) -> bool:
        return has_regions(sample.meta)


class RegionLoader(Loader):
    """An endless, seeded stream of batches of regions for one rank of several."""

    def __init__(
        self,
        pairs: Loader,
        sources: Sequence[Source],
        regions: RegionConfig,
        grid: int,
        rows: Mapping[str, int] | None = None,
    ):
        """Args:
            pairs: the loader of the training's pairs, of the same rank, pictures, texts and seed.
            grid: the image tokens at the side of a picture.
            rows: the number of pictures with regions of each shard, by its url; None, or 0 of all, as a run folder of
                before they were counted has it: they are counted now, by reading every shard once.

        Raises:
            DataError: pictures or texts that ranks cannot share evenly, or no picture with regions.
        """
        rank, world_size, seed = pairs.rank, pairs.world_size, pairs.seed
        for what, number in (("images", regions.images), ("texts", regions.texts)):
            if number % world_size:
                raise DataError(f"objectives.regions.{what} {number} cannot be split over {world_size} ranks")
        if rows is None or not any(rows.values()):
            urls = [url for source in sources for url in shards.expand(source.shards)]
            rows = {url: count_pairs(url).with_regions for url in urls}
        if not any(rows.values()):
            raise DataError(
                f"no picture of {len(rows)} shards has regions: a sample has them in its json (docs/shards.md). "
                "Without them set objectives.regions=null and leave the losses box and giou out."
            )
        config = pairs.config.model_copy(update={"batch_size": regions.images, "captions": "one"})
        super().__init__(sources, config, pairs.tokenizer, pairs.image_format, seed, rank, world_size, rows)
        self.device = pairs.device
        self._reader = RegionReader("one", config.weights, seed, rows)
        self.regions, self.grid = regions, grid
        self._warned = False

    def _view(self, row: Row, number: int) -> View | None:  # type: ignore[override]
        """A picture with regions; None where it, or one of them, cannot be used."""
        assert isinstance(row, RegionRow)
        rng = generator(self.seed, "regions", number, row.uid)
        try:
            picture = images.decode(row.image)
            known = regions_of(row.meta, *picture.size)
        except ImageError:
            return None
        except DataError as error:
            if not self._warned:
                logging.getLogger(__name__).warning(
                    "%s: %s: %s; such a picture is left out of the steps on regions", row.shard, row.uid, error
                )
            self._warned = True
            return None
        assert self.image_format is not None, "whoever has steps on regions reads pictures"
        return crop(picture, known, row.text, self.image_format, self.grid, self.regions, rng)

    def _batch(self, rows: Sequence[Row], views: Sequence[View | None], size: int, unreadable: int) -> Batch:  # type: ignore[override]
        readable = [(row, view) for row, view in zip(rows, views, strict=True) if view is not None]
        repeated = [readable[i % len(readable)] for i in range(size)]
        every = [(n, part) for n, (_, view) in enumerate(repeated) for part in view.parts]
        wanted = self.regions.texts // self.world_size
        rng = generator(self.seed, "texts", *(row.uid for row in rows))
        chosen = [*range(len(every))] * (wanted // len(every))
        chosen += rng.permutation(len(every))[: wanted - len(chosen)].tolist()
        picture, parts = [every[i][0] for i in chosen], [every[i][1] for i in chosen]
        uids = tuple(row.uid for row, _ in repeated)
        texts = [self.tokenizer.clean(part.text) for part in parts]
        ids, mask = self.tokenizer.encode(texts, self.config.max_length)
        return RegionRows(
            images=self._stack([view.pixels for _, view in repeated]),
            ids=torch.from_numpy(ids),
            mask=torch.from_numpy(mask),
            image_ids=torch.tensor([image_id(uids[n]) for n in picture]),
            uids=uids,
            unreadable=unreadable,
            image=torch.tensor(picture),
            seen=torch.from_numpy(np.stack([part.seen for part in parts])),
            boxes=torch.tensor([part.box for part in parts]),
            is_region=torch.tensor([part.box != WHOLE for part in parts]),
        )


def crop(
    picture: Image.Image,
    regions: Sequence[Region],
    text: str,
    image_format: ImageFormat,
    grid: int,
    config: RegionConfig,
    rng: np.random.Generator,
) -> View:
    """A random crop around one of the regions, with the texts of those that lie in it for the most part."""
    inside = regions[int(rng.integers(len(regions)))]
    left, top = (int(rng.integers(math.floor(edge) + 1)) for edge in (inside.left, inside.top))
    right, bottom = (
        int(rng.integers(min(math.ceil(edge), side), side + 1))
        for edge, side in ((inside.left + inside.width, picture.width), (inside.top + inside.height, picture.height))
    )
    pixels = image_format.crop_to_pixels(picture.crop((left, top, right, bottom)))
    sided = any(side in said for said in (text, *(one.text for one in regions)) for side in ("left", "right"))
    mirrored = rng.random() < 0.5 and not (config.careful_flip and sided)
    if mirrored:
        pixels = np.ascontiguousarray(pixels[:, ::-1])
    parts = [Part(text, WHOLE, np.ones(grid * grid + 1, np.int64))] if text else []
    for number in rng.permutation(len(regions)):
        if len(parts) == config.per_image:
            break
        part = _visible(regions[number], (left, top, right, bottom), config.visible)
        if part is not None:
            parts.append(_part(regions[number].text, part, (right - left, bottom - top), mirrored, grid))
    if config.randaugment is not None:
        pixels = randaugment(pixels, config.randaugment, COLOURS, rng)
    return View(pixels, parts)


def _visible(
    region: Region, edges: tuple[int, int, int, int], share: float
) -> tuple[float, float, float, float] | None:
    """What of a region lies in a crop, (x, y, w, h) from its corner; None where that is not more than a share of it."""
    left, top, right, bottom = edges
    x, y = max(left, region.left), max(top, region.top)
    width = min(right, region.left + region.width) - x
    height = min(bottom, region.top + region.height) - y
    if width <= 0 or height <= 0 or width * height / (region.width * region.height) <= share:
        return None
    return x - left, y - top, width, height


def _part(text: str, box: tuple[float, float, float, float], size: tuple[int, int], mirrored: bool, grid: int) -> Part:
    """A region of a crop of this size: its box in shares, and the patches that it touches, one at least."""
    x, y, width, height = box[0] / size[0], box[1] / size[1], box[2] / size[0], box[3] / size[1]
    x = 1 - x - width if mirrored else x
    seen = np.zeros((grid, grid), np.int64)
    (first, last), (upper, lower) = (_patches(x, width, grid), _patches(y, height, grid))
    seen[upper:lower, first:last] = 1
    return Part(text, (x + width / 2, y + height / 2, width, height), np.concatenate([[1], seen.ravel()]))


def _patches(start: float, length: float, grid: int) -> tuple[int, int]:
    """The patches along one side that a part of it touches: the first, and the one behind the last."""
    first = min(math.floor(round(start * grid, 9)), grid - 1)
    return first, max(first + 1, min(math.ceil(round((start + length) * grid, 9)), grid))
