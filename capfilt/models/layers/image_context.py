"""What a text attends to of a batch of images, however a model holds it: keys and values of each layer, or states.

Callers choose rows of it and repeat it, and never look inside; the model that made it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from capfilt.models.layers.attention import KeysValues
from capfilt.models.layers.transfer import mask_of, to_device


class ImageContext(NamedTuple):
    """Tensors with one row for each image. A tuple, so that FSDP's hooks find the tensors in it."""

    tensors: tuple[Tensor, ...]
    mask: Tensor | None = None
    """False for tokens that nothing attends to, [rows, 1, 1, N]: a region is a part of its image. None: for none."""

    @classmethod
    def of_layers(cls, layers: Iterable[KeysValues]) -> ImageContext:
        """From the keys and values of each layer, in the order of the layers."""
        return cls(tuple(tensor for pair in layers for tensor in pair))

    @property
    def layers(self) -> list[KeysValues]:
        """The keys and values of each layer, as `of_layers` took them."""
        return list(zip(self.tensors[::2], self.tensors[1::2], strict=True))

    @property
    def rows(self) -> int:
        return self.tensors[0].shape[0]

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    def select(self, rows: slice | Tensor) -> ImageContext:
        """Some of the images: a slice of them, or those at these indices [K], which may name one several times."""
        if isinstance(rows, slice):
            return self._each(lambda tensor: tensor[rows])
        # Not tensor[rows]: its backward adds rows from several threads, in an order of its own each time.
        return self._each(lambda tensor: tensor.index_select(0, rows))

    def repeat(self, times: int) -> ImageContext:
        """All images `times` times, one after the other: abab, as `Tensor.repeat`."""
        return self._each(lambda tensor: tensor.repeat(times, *[1] * (tensor.ndim - 1)))

    def repeat_interleave(self, times: int) -> ImageContext:
        """Each image `times` times, copies adjacent: aabb, as torch's."""
        return self._each(lambda tensor: tensor.repeat_interleave(times, dim=0))

    def laid_out(self) -> ImageContext:
        """The same for many steps of decoding: on a CPU each row's tensors lie together, which halves a step's reading
        (16 rows of 197 keys and one query: 0.57 ms for 0.32 in fp32); on other devices as they are."""
        return self._each(lambda tensor: tensor.contiguous()) if self.device.type == "cpu" else self

    def _each(self, change: Callable[[Tensor], Tensor]) -> ImageContext:
        mask = None if self.mask is None else change(self.mask)
        changed = {id(tensor): change(tensor) for tensor in {id(tensor): tensor for tensor in self.tensors}.values()}
        return ImageContext(tuple(changed[id(tensor)] for tensor in self.tensors), mask)


MAX_PAIRS = 256
"""Pairs that `cls_of_pairs` reads at a time."""


def cls_of_pairs(
    fuse: Callable[[Tensor, Tensor, ImageContext], Tensor],
    ids_BT: Tensor,
    lengths: Sequence[int],
    image: ImageContext,
    counts: Sequence[int],
) -> Tensor:
    """First states [B, 1, D] of texts of these lengths, `counts` texts of each image, adjacent, in models that read a
    pair as one sequence: each is read as a whole, whatever image it shares, and so not too many at once."""
    rows = to_device(torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)), ids_BT.device)
    mask_BT = mask_of(lengths, ids_BT)
    states = []
    for start in range(0, len(ids_BT), MAX_PAIRS):
        part = slice(start, start + MAX_PAIRS)
        wide = max(lengths[part])
        states.append(fuse(ids_BT[part, :wide], mask_BT[part, :wide], image.select(rows[part]))[:, :1])
    return torch.cat(states)


class DecoderCache(Protocol):
    """What `decode_step` keeps of the tokens it has read, a row for each text."""

    start: int
    """How many tokens of each text it has read."""

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows (indices or a boolean mask), in this order."""
