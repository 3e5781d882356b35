"""AdamW and the learning-rate schedules."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from capfilt.config import Config


class OptimizerConfig(Config):
    """AdamW with warm-up and decay. BLIP section 4.1: peak 3e-4, weight decay 0.05, on every parameter."""

    lr: float = Field(default=3e-4, gt=0)
    """Peak learning rate."""
    min_lr: float = Field(default=1e-6, ge=0)
    """Where the decay ends."""
    warmup: float = Field(default=0.02, ge=0, lt=1)
    """Share of the steps over which the rate grows linearly from 0."""
    decay: Literal["cosine", "exponential", "constant"] = "cosine"
    weight_decay: float = Field(default=0.05, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = Field(default=0.0, ge=0)
    """Largest global gradient norm; 0 = no clipping, as in BLIP."""


def make_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """One parameter group, decay on everything: so the public pretraining code does."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, foreach=True
    )


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of `step` (from 0) of `steps`."""
    warmup = max(1, round(config.warmup * steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if config.decay == "constant":
        return config.lr
    if config.decay == "cosine":
        return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * done)) / 2
    return max(config.min_lr, config.lr * (config.min_lr / config.lr) ** done)
