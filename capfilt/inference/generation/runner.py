"""How the steps of a batch of texts are computed: one after the other as the model computes them, or captured.

A step is written once, for both (`RunningTexts.advance`, `Search.advance`): it changes tensors in place, or hands their
next values to `hold`, so that a captured step finds all of them at the same addresses again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Protocol

from torch import Tensor

from capfilt.models import Model
from capfilt.models.layers.bert import Head
from capfilt.models.layers.fused_decoder import IMPOSSIBLE
from capfilt.models.layers.image_context import DecoderCache, ImageContext
from capfilt.models.layers.precision import at_least_fp32

MIN_ROWS = 4
"""Rows that a batch has at least: matrix libraries multiply fewer by other kernels, with other rounding."""


def least_images(images: int, rows_of_image: int) -> int:
    """How many images a batch must have so that there are MIN_ROWS rows."""
    return max(images, -(-MIN_ROWS // rows_of_image))


class StepRunner(Protocol):
    """The tokens that a batch has read, beside its images."""

    @property
    def images(self) -> int:
        """How many images there are."""

    def begin(self, image: ImageContext, rows: int, length: int, kind: Hashable) -> None:
        """Make room for texts of at most `length` tokens; steps of one `kind` and shape are the same but for the values
        of tensors."""

    def hold(self, name: str, value: Tensor) -> Tensor:
        """A tensor of these values, where steps look for it."""

    def run(self, step: int, advance: Callable[[int], None]) -> None:
        """Do a step: `advance` it, or what it does."""

    def logits(self, ids_RT: Tensor, start: int, without: int | None = None) -> Tensor:
        """Feed the newest tokens, at the positions from `start` on; logits after the last of them [R, V], in fp32 at
        least, of which `without` is IMPOSSIBLE: to fp16 that would be infinite."""

    def reorder(self, rows: Tensor, length: int) -> None:
        """What was read of row i is from now on what was read of row `rows[i]`; `length` tokens of each were."""

    def keep(self, rows: Tensor, images: Tensor, length: int) -> None:
        """Keep only these rows and the images that they are of."""

    def first_size(self, images: int, rows_of_image: int) -> int:
        """To how many images a batch is filled up."""

    def size(self, count: int, most: int) -> int:
        """How many of `most` images, or rows of an image, stay where `count` still write."""


class EagerRunner:
    """Each step as the model computes it."""

    def __init__(self, model: Model, head: Head | None):
        self.model, self.head = model, head
        self.image: ImageContext
        self.cache: DecoderCache

    @property
    def images(self) -> int:
        return self.image.rows

    def begin(self, image: ImageContext, rows: int, length: int, kind: Hashable) -> None:
        self.image, self.cache = image, self.model.cache(rows, length, image)

    def hold(self, name: str, value: Tensor) -> Tensor:
        return value

    def run(self, step: int, advance: Callable[[int], None]) -> None:
        advance(step)

    def logits(self, ids_RT: Tensor, start: int, without: int | None = None) -> Tensor:
        logits = at_least_fp32(self.model.decode_step(ids_RT, self.image, self.cache, self.head))
        if without is not None:
            logits[:, without] = IMPOSSIBLE
        return logits

    def reorder(self, rows: Tensor, length: int) -> None:
        self.cache.keep(rows)

    def keep(self, rows: Tensor, images: Tensor, length: int) -> None:
        if len(images) < self.images:
            self.image = self.image.select(images)
        self.cache.keep(rows)

    def first_size(self, images: int, rows_of_image: int) -> int:
        return least_images(images, rows_of_image)

    def size(self, count: int, most: int) -> int:
        return count
