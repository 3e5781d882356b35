"""AdamW and the learning-rate schedules."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import nn
from torch.distributed.tensor import DTensor

from capfilt.config import Config


class OptimizerConfig(Config):
    """AdamW with warm-up and decay. BLIP section 4.1: peak 3e-4, weight decay 0.05, on every parameter.

    BLIP's decay is "exponential": x `rate` after each of 20 epochs, 0.9 in the released configuration, 0.85 in the
    paper. That is a third of the last epoch's rate: 4.1e-5 against 1.4e-5.
    """

    lr: float = Field(default=3e-4, gt=0)
    """Peak learning rate."""
    min_lr: float = Field(default=1e-6, ge=0)
    """Where the cosine ends; below it the exponential never falls."""
    warmup: float = Field(default=0.02, ge=0, lt=1)
    """Share of the steps over which the rate grows linearly from `warmup_lr`."""
    warmup_lr: float = Field(default=0.0, ge=0)
    """Where the warm-up begins; BLIP: 1e-6."""
    decay: Literal["cosine", "epoch_cosine", "exponential", "constant"] = "cosine"
    """"epoch_cosine" is the cosine of BLIP's fine-tuning: one rate for each of `epochs`, and no warm-up in it."""
    rate: float = Field(default=0.9, gt=0, le=1)
    """Exponential: what the learning rate is multiplied by after each epoch."""
    epochs: int = Field(default=20, ge=1)
    """Exponential and epoch_cosine: how many epochs the steps are; within one the rate stays."""
    weight_decay: float = Field(default=0.05, ge=0)
    decay_vectors: bool = True
    """Whether biases, norms and other vectors decay too: in BLIP's code they do, in BLIP-2's not."""
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = Field(default=0.0, ge=0)
    """Largest global gradient norm; 0 = no clipping, as in BLIP."""


def make_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Decay on everything, as BLIP's public code does; or a group without, for vectors.

    What takes no gradient (BLIP-2's frozen towers, a momentum copy) is in none.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for p in (p for p in module.parameters() if p.requires_grad):
        decays = config.decay_vectors or p.ndim >= 2
        # One update of many parameters takes those that FSDP has cut, or those that are whole, not both.
        groups.setdefault((decays, isinstance(p, DTensor)), []).append(p)
    given = [
        {"params": groups[key], **({} if key[0] else {"weight_decay": 0.0})} for key in sorted(groups, reverse=True)
    ]
    # On a GPU the fused kernel; elsewhere its last bits would be other ones than those of the curves in the tests.
    kernel = {"fused": True} if next(iter(groups.values()))[0].is_cuda else {"foreach": True}
    return torch.optim.AdamW(given, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, **kernel)


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of `step` (from 0) of `steps`."""
    warmup = max(1, round(config.warmup * steps))
    if step < warmup:
        return config.warmup_lr + (config.lr - config.warmup_lr) * (step + 1) / warmup
    if config.decay == "constant":
        return config.lr
    epoch = step * config.epochs // steps
    if config.decay in ("cosine", "epoch_cosine"):
        even = (step - warmup) / max(1, steps - warmup)
        done = even if config.decay == "cosine" else epoch / config.epochs
        return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * done)) / 2
    rate: float = config.lr * config.rate**epoch
    return max(config.min_lr, rate)
