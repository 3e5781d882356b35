"""Collect tensors from all ranks, with or without their gradients.

Without torch.distributed there is one rank, so that objectives read the same on one process and on many.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from capfilt.models.layers.precision import at_least_fp32

_by_itself = False


@contextmanager
def alone() -> Iterator[None]:
    """As if this process trained by itself: nothing is exchanged."""
    global _by_itself
    before, _by_itself = _by_itself, True
    try:
        yield
    finally:
        _by_itself = before


def distributed() -> bool:
    """Whether this process trains under torch.distributed, be it with others or as the only one of its group."""
    return dist.is_initialized() and not _by_itself


def world_size() -> int:
    return dist.get_world_size() if distributed() else 1


def rank() -> int:
    return dist.get_rank() if distributed() else 0


@torch.no_grad()
def gather(x: Tensor) -> Tensor:
    """Concatenate [B, ...] of every rank in rank order, [ranks * B, ...], without gradient."""
    if world_size() == 1:
        return x.detach()
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def gather_with_gradient(x: Tensor) -> Tensor:
    """As `gather`, and a rank's rows collect the gradients of every rank that used them.

    Data-parallel training then takes the mean over ranks, so a loss that is a mean over a rank's own rows ends with
    the gradient of the mean over all rows.
    """
    if world_size() == 1:
        return x
    return _Gather.apply(x)


class _Gather(torch.autograd.Function):
    """torch has one too, in torch.distributed.nn; over gloo it mixes up gradients that do not lie row by row in memory,
    as those of a transposed product do (torch 2.13)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        return gather(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        every = gradients[0].contiguous().clone()
        dist.all_reduce(every)
        return every[rank() * ctx.rows : (rank() + 1) * ctx.rows]


@torch.no_grad()
def as_wide(x_BT: Tensor) -> Tensor:
    """Pad texts [B, T] with zeros to the longest T of all ranks, so that they can be gathered."""
    if world_size() == 1:
        return x_BT
    width = torch.tensor(x_BT.shape[1], device=x_BT.device)
    dist.all_reduce(width, dist.ReduceOp.MAX)
    return F.pad(x_BT, (0, int(width) - x_BT.shape[1]))


@torch.no_grad()
def share_of_total(count: Tensor) -> Tensor | float:
    """What a rank's mean over `count` things weighs, so that the mean over ranks is the mean over the things of all."""
    return 1.0 if world_size() == 1 else count * world_size() / all_reduce_sum(count)


@torch.no_grad()
def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum over ranks, as floats."""
    total = at_least_fp32(x)
    if world_size() > 1:
        total = total.clone()
        dist.all_reduce(total)
    return total
