"""FSDP2: every process holds its share of the weights, and all of a block's only while that block computes.

The blocks of a family (`Family.blocks`) are gathered one by one, and as one what lies between them (embeddings, heads;
BLIP-2's Q-Former). The momentum copy is cut as its model is, so that following it takes no exchange. Whole on every
process stay the temperature, which no process could have a share of, and BLIP-2's frozen towers: they have neither
gradients nor moments, 2 bytes a weight are all that they cost.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from capfilt.models import Model, family_of
from capfilt.objectives.collectives import world_size
from capfilt.objectives.interface import LossesAndMetrics, StepBatch, Task

PRECISION = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
"""Weights are gathered and gradients summed as they are held, in fp32, and autocast computes in bf16 where it does
without FSDP: the same numbers either way. Gathering in bf16 would halve the traffic, and the norms would get bf16
weights beside fp32 states, which torch's CPU kernels refuse."""


def shard(task: Task, device: torch.device, call_by_call: bool = False) -> None:
    """Cut the task's models.

    What lies between the blocks is gathered for a whole step, or `call_by_call` of the model's methods, where a step is
    no single forward pass: then it is gathered and its gradients are summed several times.
    """
    # A model's methods return views of their inputs here and there; nothing writes into them in place, which is what
    # torch warns of.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    mesh = init_device_mesh(device.type, (world_size(),))
    whole = {p for p in task.model.parameters() if p.ndim == 0 or not p.requires_grad}
    _cut_blocks(task.model, mesh, whole, trained=True)
    if task.momentum is not None:
        copy = task.momentum.model
        scalars = {p for p in copy.parameters() if p.ndim == 0}
        _cut_blocks(copy, mesh, scalars, trained=False)
        _cut_rest(copy, copy.entry_points, mesh, scalars)
    if call_by_call:
        _cut_rest(task.model, task.model.entry_points, mesh, whole)
    else:
        _cut_rest(task, ("compute_losses",), mesh, whole)


def _cut_blocks(model: Model, mesh: DeviceMesh, whole: set[nn.Parameter], trained: bool) -> None:
    for block in family_of(model.config).code.blocks:
        for module in (module for module in model.modules() if isinstance(module, block.kind)):
            if all(p in whole for p in module.parameters()):
                continue
            kept = trained and block.repeated
            fully_shard(module, mesh=mesh, reshard_after_forward=not kept, mp_policy=PRECISION, ignored_params=whole)
            for name in block.entry_points:
                register_fsdp_forward_method(module, name)


def _cut_rest(module: nn.Module, entry_points: Iterable[str], mesh: DeviceMesh, whole: set[nn.Parameter]) -> None:
    fully_shard(module, mesh=mesh, reshard_after_forward=False, mp_policy=PRECISION, ignored_params=whole)
    for name in entry_points:
        register_fsdp_forward_method(module, name)


def forward(task: Task, batch: StepBatch, progress: float) -> LossesAndMetrics:
    """The task's forward pass; its momentum copy moves before any weight is gathered."""
    task.before_step()
    return task.compute_losses(batch, progress)


def after_backward(task: Task) -> None:
    """After a step's backward pass: average the gradients that FSDP leaves alone, and let go of the momentum copy's
    gathered weights, which the next step moves."""
    for p in task.parameters():
        if p.grad is not None and not isinstance(p.grad, DTensor):
            dist.all_reduce(p.grad)
            p.grad /= world_size()
    if task.momentum is not None:
        for module in task.momentum.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


@torch.no_grad()
def clip(task: Task, most: float) -> Tensor:
    """As torch's clip_grad_norm_, for gradients of which some are cut and some are whole."""
    gradients = [p.grad for p in task.parameters() if p.grad is not None]
    cut = [g.to_local() for g in gradients if isinstance(g, DTensor)]
    whole = [g for g in gradients if not isinstance(g, DTensor)]
    square = torch.stack(torch._foreach_norm(cut)).square().sum()
    dist.all_reduce(square)
    norm = (square + sum(g.square().sum() for g in whole)).sqrt()
    if most < math.inf:
        torch._foreach_mul_(cut + whole, (most / (norm + 1e-6)).clamp(max=1.0))
    return norm


def whole(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module's `state_dict`, gathered where they are cut; all ranks must ask for them."""
    return {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensor in module.state_dict().items()
    }
