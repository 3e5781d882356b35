"""The vision transformer (ViT): a picture in, one token per patch and a [CLS] token out.

As in timm and BLIP: pre-norm, learned absolute positions with a place for [CLS], biases everywhere, LayerNorm with
eps 1e-6, final norm. EVA's ViT-g, which BLIP-2 looks through, has no bias of keys and is used before its final norm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from capfilt.models.layers.attention import FeedForward, FusedSelfAttention, stochastic_depth
from capfilt.models.layers.block import Block
from capfilt.models.layers.config import VisionConfig
from capfilt.models.layers.precision import at_least_fp32


class VisionBlock(nn.Module):
    """One pre-norm transformer block. `depth` is what `stochastic_depth` drew for its two branches; an argument, so
    that blocks that differ in nothing but the rate are compiled once."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.attention = FusedSelfAttention(config.width, config.heads, config.key_bias)
        self.feed_forward_norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config.width, config.hidden)

    def forward(self, x_BND: Tensor, depth_2B11: Tensor | None) -> Tensor:
        branch = self.attention(self.attention_norm(x_BND))
        x_BND = x_BND + (branch if depth_2B11 is None else branch * depth_2B11[0])
        branch = self.feed_forward(self.feed_forward_norm(x_BND))
        out: Tensor = x_BND + (branch if depth_2B11 is None else branch * depth_2B11[1])
        return out


VISION_BLOCK = Block(VisionBlock)


class VisionTransformer(nn.Module):
    """Pictures [B, 3, S, S] (normalised floats) -> tokens [B, 1 + patches, width]; token 0 is [CLS]."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.patches = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)
        self.cls = nn.Parameter(torch.zeros(1, 1, config.width))
        self.positions = nn.Parameter(torch.zeros(1, config.num_tokens, config.width))
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.rates = [config.drop_path * i / max(config.depth - 1, 1) for i in range(config.depth)]
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps) if config.final_norm else nn.Identity()
        self.recompute = 0
        """How many of the last blocks keep no activations for the backward pass and compute them again: a matter of
        memory, not of the architecture. BLIP fine-tunes so: the last 4 of ViT-B for retrieval, 12 of ViT-L."""
        self.apply(self._initialise)
        nn.init.trunc_normal_(self.cls, std=0.02)
        nn.init.trunc_normal_(self.positions, std=0.02)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=self.config.init_std)
            nn.init.zeros_(module.bias)

    def forward(self, images_B3SS: Tensor) -> Tensor:
        x_BND = self.patches(images_B3SS).flatten(2).transpose(1, 2)
        x_BND = torch.cat([self.cls.expand(x_BND.shape[0], -1, -1), x_BND], dim=1) + self.positions
        kept = len(self.blocks) - self.recompute
        for i, (block, rate) in enumerate(zip(self.blocks, self.rates, strict=True)):
            depth = stochastic_depth(x_BND, rate if self.training else 0.0)
            if i >= kept and torch.is_grad_enabled():
                x_BND = torch.utils.checkpoint.checkpoint(block, x_BND, depth, use_reentrant=False)
            else:
                x_BND = block(x_BND, depth)
        tokens: Tensor = self.norm(x_BND)
        return tokens


def resize_positions(positions_1ND: Tensor, image_size: int, patch_size: int) -> Tensor:
    """Interpolate position embeddings to another picture size: bicubic over the patch grid, [CLS] kept as it is.

    BLIP does so whenever pretraining (224) goes over to fine-tuning (384, 480).
    """
    old, new = round((positions_1ND.shape[1] - 1) ** 0.5), image_size // patch_size
    if old == new:
        return positions_1ND
    cls, grid = positions_1ND[:, :1], positions_1ND[:, 1:]
    grid = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(at_least_fp32(grid), size=(new, new), mode="bicubic", align_corners=False).to(
        positions_1ND.dtype
    )
    return torch.cat([cls, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
