"""Copies from the host to a device that the host does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device. For a GPU it goes through pinned memory: from any other the driver copies while
    the host waits."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
