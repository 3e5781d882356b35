"""Work on any number of items in parts of one size: a GPU picks kernels, and with them the rounding, by the shapes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from capfilt.models.layers.transfer import to_device


def in_parts_of(size: int, count: int, device: torch.device, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """What `compute` makes of items by their numbers [size], for all of them [count, ...]; the last item fills up the
    last part."""
    numbers = torch.arange(-(-count // size) * size).clamp(max=count - 1)
    return torch.cat([compute(part) for part in to_device(numbers, device).split(size)])[:count]


def mask_of(ids_TL: Tensor, lengths: list[int]) -> Tensor:
    """True where a text has a token, [T, L]."""
    return (
        torch.arange(ids_TL.shape[1], device=ids_TL.device) < to_device(torch.tensor(lengths), ids_TL.device)[:, None]
    )
