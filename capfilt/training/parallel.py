"""Several processes that train one model: who this one is, and the wrapper that averages gradients."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def rank() -> int:
    """This process among those that train."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """How many processes train."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wrap(module: nn.Module, device: torch.device) -> nn.Module:
    """Average gradients over ranks; as it is on one."""
    if ranks() == 1:
        return module
    # Queues and momentum copies are equal on every rank by construction: broadcasting them each step would only cost.
    # A static graph allows weights that no objective of this training reaches (ITC alone leaves out the match head).
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=ids, broadcast_buffers=False, static_graph=True)


def barrier() -> None:
    """Wait for all ranks."""
    if ranks() > 1:
        dist.barrier()
