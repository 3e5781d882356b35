"""The pre-norm block that ViTs and CLIP's text stack are made of, and how blocks are treated where they are gathered
(FSDP) or compiled one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from capfilt.models.layers.attention import FeedForward, FusedSelfAttention
from capfilt.models.layers.config import Activation


@dataclass(frozen=True)
class Block:
    """A kind of module that FSDP gathers and torch compiles one by one."""

    kind: type[nn.Module]
    entry_points: tuple[str, ...] = ()
    """Its methods, besides `forward`, that use its weights."""
    repeated: bool = False
    """Whether it runs several times a step and, where it is trained, keeps its gathered weights in between."""


class PreNormBlock(nn.Module):
    """One transformer block, normalised before each of its two branches."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        layer_norm_eps: float,
        activation: Activation = "gelu",
        key_bias: bool = True,
        causal: bool = False,
        dropout: float = 0.0,
    ):
        """Args:
        shape: width, heads, and inner width of the feed-forward layers.
        causal: whether a token sees itself and those before it alone.
        dropout: of the outputs of attention and of both feed-forward layers; the public ViTs have none.
        """
        super().__init__()
        width, heads, hidden = shape
        self.attention_norm = nn.LayerNorm(width, eps=layer_norm_eps)
        self.attention = FusedSelfAttention(width, heads, key_bias, causal)
        self.feed_forward_norm = nn.LayerNorm(width, eps=layer_norm_eps)
        self.feed_forward = FeedForward(width, hidden, activation, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BND: Tensor, depth_2B11: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Tokens -> tokens. `depth_2B11` is what `stochastic_depth` drew for the two branches; an argument, so that
        blocks that differ in nothing but the rate are compiled once. `mask` as of `FusedSelfAttention`."""
        branch = self.dropout(self.attention(self.attention_norm(x_BND), mask))
        x_BND = x_BND + (branch if depth_2B11 is None else branch * depth_2B11[0])
        branch = self.dropout(self.feed_forward(self.feed_forward_norm(x_BND)))
        return x_BND + (branch if depth_2B11 is None else branch * depth_2B11[1])


def recomputed(again: bool, block: nn.Module, *args: object) -> Any:
    """What a block gives; `again`: in training it keeps no activations and computes them once more on the way back."""
    if again and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)


def initialise(module: nn.Module, std: float) -> None:
    """Draw fresh weights of a vision transformer's linear layers."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
