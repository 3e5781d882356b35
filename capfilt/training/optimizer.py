"""AdamW and the learning-rate schedules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from capfilt.training.config import OptimizerConfig

RATE = "rate"
"""The key of a group of weights for what their learning rate is multiplied by."""


def make_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Decay on everything, as BLIP's public code does; or a group without, for vectors.

    What takes no gradient (BLIP-2's frozen towers, a momentum copy) is in none.
    """
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    vectors, matrices = _named(module, "vectors"), _named(module, "matrices")
    rates = dict.fromkeys(_named(module, "fresh") if config.fresh_rate != 1 else (), config.fresh_rate)
    rates |= dict.fromkeys(_of_heads(module) if config.head_rate != 1 else (), config.head_rate)
    for p in (p for p in module.parameters() if p.requires_grad):
        decays = config.decay_vectors or id(p) in matrices or (p.ndim >= 2 and id(p) not in vectors)
        if p.ndim == 0 and config.decay_scalars is not None:
            decays = config.decay_scalars
        # One update of many parameters takes those that FSDP has cut, or those that are whole, not both.
        groups.setdefault((decays, isinstance(p, DTensor), rates.get(id(p), 1.0)), []).append(p)
    given = [
        {
            "params": groups[key],
            **({} if key[0] else {"weight_decay": 0.0}),
            **({} if key[2] == 1 else {RATE: key[2]}),
        }
        for key in sorted(groups, reverse=True)
    ]
    # On a GPU the fused kernel; elsewhere its last bits would be other ones than those of the curves in the tests.
    kernel = {"fused": True} if next(iter(groups.values()))[0].is_cuda else {"foreach": True}
    kind = TransformersAdamW if config.adamw == "transformers" else torch.optim.AdamW
    return kind(given, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, **kernel)


def _of_heads(module: nn.Module) -> set[int]:
    """The ids of the weights of heads on bases."""
    heads = (head for part in module.modules() for head in getattr(part, "head_modules", ()))
    return {id(p) for head in heads for p in head.parameters()}


def _named(module: nn.Module, kind: str) -> set[int]:
    """The ids of the weights that parts of a model name as `vectors` or `matrices`: a family's own code decays some
    vectors, or spares what has more dimensions here; or as `fresh`, which came from no checkpoint."""
    return {id(part.get_parameter(name)) for part in module.modules() for name in getattr(part, kind, ())}


class TransformersAdamW(torch.optim.AdamW):
    """AdamW as transformers had it before version 5, with which ViLT, VLMo and X-VLM were trained: epsilon is added
    before the second moment is corrected for its bias, and weights decay after they were moved."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of all weights that have gradients."""
        assert closure is None, "the loop computes gradients itself"
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                self._move(p, p.grad, group)

    def _move(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        steps = float(state["step"])
        state["exp_avg"].mul_(beta1).add_(grad, alpha=1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        size = group["lr"] * math.sqrt(1 - beta2**steps) / (1 - beta1**steps)
        p.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-size)
        p.add_(p, alpha=-group["lr"] * group["weight_decay"])


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Let all weights learn at a rate, those of a group with a `RATE` at so many times that."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(RATE, 1.0)


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of `step` (from 0) of `steps`."""
    first, epoch = config.warmup_first, step * config.epochs // steps
    warmup = max(first, round(config.warmup * steps))
    # The released codes warm up inside epoch 0 alone, whether the peak is reached in it or not.
    cut_off = first == 0 and epoch > 0 and config.decay in ("epoch_cosine", "exponential")
    hold = config.warmup_hold
    place = step if hold == 1 else max(0, step - 1) // hold * hold  # ALBEF's code sets the rate behind a step
    if place < warmup and not cut_off:
        return config.warmup_lr + (config.lr - config.warmup_lr) * (place + first) / warmup
    if config.decay == "constant":
        return config.lr
    if config.decay == "linear":
        return config.min_lr + (config.lr - config.min_lr) * (1 - (step - warmup) / max(1, steps - warmup))
    if config.decay in ("cosine", "epoch_cosine"):
        even = (step - warmup) / max(1, steps - warmup)
        done = even if config.decay == "cosine" else epoch / config.epochs
        return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * done)) / 2
    rate: float = config.lr * config.rate**epoch
    return max(config.min_lr, rate)
