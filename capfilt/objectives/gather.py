"""Collect tensors from all ranks, without their gradients.

Without torch.distributed there is one rank, so that objectives read the same on one process and on many.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def ranks() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is."""
    return dist.get_rank() if dist.is_initialized() else 0


@torch.no_grad()
def gather(x: Tensor) -> Tensor:
    """Concatenate [B, ...] of every rank in rank order, [ranks * B, ...], without gradient."""
    if ranks() == 1:
        return x.detach()
    parts = [torch.empty_like(x) for _ in range(ranks())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)
