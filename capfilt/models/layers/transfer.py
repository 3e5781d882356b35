"""Copies from the host to a device that the host does not wait for, and masks that are made of what is copied so."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device. For a GPU it goes through pinned memory: from any other the driver copies while
    the host waits."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def mask_of(lengths: Sequence[int], ids_BT: Tensor) -> Tensor:
    """True for the tokens that texts of these lengths have, [B, T], where the ids are."""
    count_B1 = to_device(torch.tensor(lengths), ids_BT.device)[:, None]
    return torch.arange(ids_BT.shape[1], device=ids_BT.device) < count_B1
