"""FSDP2: every process holds its share of the weights, and all of a block's only while that block computes.

The blocks of BLIP's towers are gathered one by one, what lies between them (embeddings, projections, heads; BLIP-2's
Q-Former) as one. The momentum copy is cut as its model is, so that following it takes no exchange. Whole on every
process stay the temperature, which no process could have a share of, and BLIP-2's frozen towers: they have neither
gradients nor moments, 2 bytes a weight are all that they cost.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from capfilt.models.layers.bert import TextLayer
from capfilt.models.layers.vit import VisionBlock
from capfilt.objectives.collectives import world_size
from capfilt.objectives.tasks.blip import BlipPretraining, LossesAndMetrics
from capfilt.objectives.tasks.blip2 import Pretraining

BLOCKS = (VisionBlock, TextLayer)
"""What is gathered, and compiled, one by one."""

PRECISION = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
"""Weights are gathered and gradients summed as they are held, in fp32, and autocast computes in bf16 where it does
without FSDP: the same numbers either way. Gathering in bf16 would halve the traffic, and the norms would get bf16
weights beside fp32 states, which torch's CPU kernels refuse."""

VERBS = (
    "encode_image", "image_context", "encode_text", "project_image", "project_queries", "project_text",
    "fuse", "match", "decode", "predict",
)  # fmt: skip
"""Ways into a model, besides `forward`, that its objectives take."""


def shard(learner: Pretraining, device: torch.device, verb_by_verb: bool = False) -> None:
    """Cut the learner's models.

    What lies between the blocks is gathered for a whole step, or `verb_by_verb`, where a step is no single forward
    pass: then it is gathered and its gradients are summed several times.
    """
    # The verbs return views of their inputs here and there; nothing writes into them in place, which is what torch
    # warns of.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    mesh = init_device_mesh(device.type, (world_size(),))
    whole = {p for p in learner.model.parameters() if p.ndim == 0 or not p.requires_grad}
    _cut_blocks(learner.model, mesh, whole, keep=True)
    if learner.momentum is not None:
        copy = learner.momentum.model
        scalars = {p for p in copy.parameters() if p.ndim == 0}
        _cut_blocks(copy, mesh, scalars, keep=False)
        _cut_rest(copy, VERBS, mesh, scalars)
    if verb_by_verb:
        _cut_rest(learner.model, VERBS, mesh, whole)
    else:
        _cut_rest(learner, ("compute_losses",), mesh, whole)


def _cut_blocks(model: nn.Module, mesh: DeviceMesh, whole: set[nn.Parameter], keep: bool) -> None:
    for block in (module for module in model.modules() if isinstance(module, BLOCKS)):
        if all(p in whole for p in block.parameters()):
            continue
        # A text block is asked up to six times a step and, where it is to learn, keeps its weights in between.
        kept = keep and isinstance(block, TextLayer)
        fully_shard(block, mesh=mesh, reshard_after_forward=not kept, mp_policy=PRECISION, ignored_params=whole)
        for name in ("image_context", "self_keys_values") if isinstance(block, TextLayer) else ():
            register_fsdp_forward_method(block, name)


def _cut_rest(module: nn.Module, ways_in: Iterable[str], mesh: DeviceMesh, whole: set[nn.Parameter]) -> None:
    fully_shard(module, mesh=mesh, reshard_after_forward=False, mp_policy=PRECISION, ignored_params=whole)
    for name in ways_in:
        if hasattr(module, name):
            register_fsdp_forward_method(module, name)


def ask(learner: Pretraining, *batch: Any) -> LossesAndMetrics:
    """The learner's forward pass; its momentum copy moves before any weight is gathered."""
    if isinstance(learner, BlipPretraining):
        learner.begin()
        return learner.compute_losses(*batch)
    found: LossesAndMetrics = learner(*batch)
    return found


def settle(learner: Pretraining) -> None:
    """After a step's backward pass: average the gradients that FSDP leaves alone, and let go of the momentum copy's
    gathered weights, which the next step moves."""
    for p in learner.parameters():
        if p.grad is not None and not isinstance(p.grad, DTensor):
            dist.all_reduce(p.grad)
            p.grad /= world_size()
    if learner.momentum is not None:
        for module in learner.momentum.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


@torch.no_grad()
def clip(learner: Pretraining, most: float) -> Tensor:
    """As torch's clip_grad_norm_, for gradients of which some are cut and some are whole."""
    gradients = [p.grad for p in learner.parameters() if p.grad is not None]
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
