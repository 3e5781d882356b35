"""Several processes that train one model: who this one is, and how a step's gradients become those of all its pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from capfilt.inference.device import autocast
from capfilt.models import family_of
from capfilt.objectives.collectives import rank, world_size
from capfilt.objectives.interface import LossesAndMetrics, PairBatch, StepBatch, Task
from capfilt.training.config import ExecutionConfig
from capfilt.training.distributed import fsdp

T = TypeVar("T")

__all__ = ["Gradients", "barrier", "of_all", "of_first", "rank", "world_size", "wrap"]


WAYS = 64
"""In how many ways a block may be compiled; one more is an error, and a sign that something is compiled for each batch
anew."""


class Gradients:
    """Gradients of a task's loss over the pairs of all ranks. Made before the optimizer: FSDP puts other parameters
    in the place of a model's own."""

    def __init__(self, task: Task, execution: ExecutionConfig, device: torch.device, dtype: torch.dtype):
        self.task, self.chunks, self.device = task, execution.micro_batches, device
        self.sharded = execution.parallel == "fsdp" and world_size() > 1
        self.autocast: Callable[[], AbstractContextManager[object]] = partial(autocast, device, dtype)
        if execution.compile:
            compile_blocks(task)
        if self.sharded:
            fsdp.shard(task, device, call_by_call=self.chunks > 1 and task.chunks_enter_model)
        # In chunks there are several backward passes to one average, and the averaging is ours.
        plain = self.sharded or self.chunks > 1
        wrapped = (task if plain else wrap(task, device, not task.several_kinds)).train()
        self.forward: Callable[..., LossesAndMetrics] = partial(fsdp.forward, task) if self.sharded else wrapped

    def of(self, batch: StepBatch, progress: float) -> LossesAndMetrics:
        """Set the gradients to those of these pairs and of all other ranks'; returns this rank's losses and metrics."""
        self.task.zero_grad(set_to_none=True)
        if self.chunks > 1:
            assert isinstance(batch, PairBatch), "only pairs are cut; recipes that would cut others are refused"
            losses, metrics = self.task.backward_in_chunks(batch, progress, self.chunks, self.autocast)
            if world_size() > 1 and not self.sharded:
                average([p.grad for p in self.task.parameters() if p.grad is not None])
        else:
            with self.autocast():
                losses, metrics = self.forward(batch, progress)
                total = self.task.total(losses)
            total.backward()
        if self.sharded:
            fsdp.after_backward(self.task)
        return losses, metrics

    def clip(self, most: float) -> Tensor:
        """Scale the gradients down to this global norm, 0 = leave them; returns the norm that they had.

        It is the same on all ranks, so that all of them leave out the same steps where it is not finite.
        """
        if self.sharded:
            return fsdp.clip(self.task, most or math.inf)
        return torch.nn.utils.clip_grad_norm_(self.task.model.parameters(), most or math.inf)


def wrap(module: nn.Module, device: torch.device, same_weights: bool = True) -> nn.Module:
    """Average gradients over ranks while they are computed; as it is on one. `same_weights`: whether every step reaches
    the same weights."""
    if world_size() == 1:
        return module
    # Queues and momentum copies are equal on every rank by construction: broadcasting them each step would only cost.
    # A static graph allows weights that no objective of this training reaches (ITC alone leaves out the match head).
    ids = [device.index] if device.type == "cuda" else None
    # Gradients lie where they are exchanged from: a copy of all of them less in memory, and two less a step.
    return DistributedDataParallel(
        module,
        device_ids=ids,
        forward_sync_buffers=False,
        gradient_as_bucket_view=True,
        static_graph=same_weights,
        find_unused_parameters=not same_weights,
    )


def average(gradients: list[Tensor]) -> None:
    """Replace gradients by their means over ranks, in one exchange."""
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def compile_blocks(task: Task) -> None:
    """Compile each block of the towers by itself, those of the momentum copy too: equal blocks are compiled once.

    A text layer is asked in some ten ways (both roles, with images and without, with gradients and without), more than
    torch compiles by default; beyond that it would go on uncompiled without a word.
    """
    torch._dynamo.config.recompile_limit = WAYS
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    kinds = tuple(block.kind for block in family_of(task.model.config).code.blocks)
    for module in task.modules():
        if isinstance(module, kinds):
            module.compile()


def of_first(value: T) -> T:
    """What the first rank has, on every rank."""
    said = [value]
    if world_size() > 1:
        dist.broadcast_object_list(said)
    return said[0]


def of_all(value: T) -> list[T]:
    """What each rank has, in their order, on every rank."""
    said: list[T] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(said, value)
    return said


def barrier(patience: timedelta | None = None) -> None:
    """Wait for all ranks; for `patience` where that is more than the minutes after which torch takes one for lost."""
    if world_size() == 1:
        return
    if patience is None:
        dist.barrier()
        return
    group = dist.new_group(backend="gloo", timeout=patience)
    dist.barrier(group)
    dist.destroy_process_group(group)
