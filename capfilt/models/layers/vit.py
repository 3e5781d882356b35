"""The vision transformer (ViT): a picture in, one token per patch and a [CLS] token out.

As in timm and BLIP: pre-norm, learned absolute positions with a place for [CLS], biases everywhere, LayerNorm with
eps 1e-6, final norm. EVA's ViT-g, which BLIP-2 looks through, has no bias of keys and is used before its final norm.
CLIP's has a norm before its first block, no bias of patches, and another activation. ViLT runs the blocks over texts
and patches together, with pictures of any shape (`run`, `positions_of_shapes`).
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capfilt.models.layers.attention import stochastic_depth
from capfilt.models.layers.block import Block, PreNormBlock, initialise, recomputed
from capfilt.models.layers.config import VisionConfig
from capfilt.models.layers.precision import at_least_fp32

VISION_BLOCK = Block(PreNormBlock)


class VisionTransformer(nn.Module):
    """Pictures [B, 3, S, S] (normalised floats) -> tokens [B, 1 + patches, width]; token 0 is [CLS]."""

    def __init__(self, config: VisionConfig, dropout: float = 0.0):
        """`dropout` as of the blocks."""
        super().__init__()
        self.config = config
        patch = config.patch_size
        self.patches = nn.Conv2d(3, config.width, patch, stride=patch, bias=config.patch_bias)
        self.cls = nn.Parameter(torch.zeros(1, 1, config.width))
        self.positions = nn.Parameter(torch.zeros(1, config.num_tokens, config.width))
        norm = partial(nn.LayerNorm, config.width, eps=config.layer_norm_eps)
        self.pre_norm = norm() if config.pre_norm else nn.Identity()
        block = partial(PreNormBlock, (config.width, config.heads, config.hidden), config.layer_norm_eps)
        self.blocks = nn.ModuleList(
            block(config.activation, config.key_bias, dropout=dropout) for _ in range(config.depth)
        )
        self.rates = [config.drop_path * i / max(config.depth - 1, 1) for i in range(config.depth)]
        self.norm = norm() if config.final_norm else nn.Identity()
        self.recompute = 0
        """How many of the last blocks keep no activations for the backward pass and compute them again: a matter of
        memory, not of the architecture. BLIP fine-tunes so: the last 4 of ViT-B for retrieval, 12 of ViT-L."""
        self.apply(partial(initialise, std=config.init_std))
        nn.init.trunc_normal_(self.cls, std=0.02)
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, images_B3SS: Tensor) -> Tensor:
        return self.run(self.embed(images_B3SS))

    def embed(self, images_B3SS: Tensor) -> Tensor:
        """Pictures -> embedded tokens, as the first block reads them."""
        x_BND = self.patches(images_B3SS).flatten(2).transpose(1, 2)
        x_BND = torch.cat([self.cls.expand(x_BND.shape[0], -1, -1), x_BND], dim=1) + self.positions
        return self.pre_norm(x_BND)

    def run(self, x_BND: Tensor, mask: Tensor | None = None) -> Tensor:
        """Embedded tokens -> tokens: blocks and final norm. `mask` as of `FusedSelfAttention`."""
        return self.norm(self.run_blocks(x_BND, range(len(self.blocks)), mask))

    def run_blocks(self, x_BND: Tensor, numbers: range, mask: Tensor | None = None) -> Tensor:
        """Tokens -> tokens through the blocks of these numbers."""
        kept = len(self.blocks) - self.recompute
        for n in numbers:
            depth = stochastic_depth(x_BND, self.rates[n] if self.training else 0.0)
            x_BND = recomputed(n >= kept, self.blocks[n], x_BND, depth, mask)
        return x_BND


def resize_positions(positions_1ND: Tensor, image_size: int, patch_size: int, antialias: bool = False) -> Tensor:
    """Interpolate position embeddings to another picture size: bicubic over the patch grid, [CLS] kept as it is.

    BLIP does so whenever pretraining (224) goes over to fine-tuning (384, 480); open_clip with `antialias`, which
    matters where the grid shrinks.
    """
    old, new = round((positions_1ND.shape[1] - 1) ** 0.5), image_size // patch_size
    if old == new:
        return positions_1ND
    cls, grid = positions_1ND[:, :1], positions_1ND[:, 1:]
    grid = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(at_least_fp32(grid), (new, new), mode="bicubic", align_corners=False, antialias=antialias)
    grid = resized.to(positions_1ND.dtype)
    return torch.cat([cls, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def positions_of_shapes(positions_1ND: Tensor, there_BHW: Tensor) -> Tensor:
    """Position embeddings of pictures of unequal shapes, [B, H, W, D]: bilinear over the table's grid, corners on
    corners, as ViLT interpolates for each picture; at least fp32.

    `there_BHW` is True for the patches of a picture, which lie in the upper left; 0 elsewhere.
    """
    side = math.isqrt(positions_1ND.shape[1] - 1)
    with torch.autocast(positions_1ND.device.type, enabled=False):
        table = at_least_fp32(positions_1ND[0, 1:]).view(side, side, -1)
        rows_BHG = _between_corners(there_BHW[:, :, 0], side, table)
        columns_BWG = _between_corners(there_BHW[:, 0], side, table)
        return torch.einsum("bhg,gkd,bwk->bhwd", rows_BHG, table, columns_BWG)


def _between_corners(there_BL: Tensor, side: int, like: Tensor) -> Tensor:
    """For each place of a line the weights of the table's `side` places, [B, L, side]; 0 where nothing is."""
    sizes_B1 = there_BL.sum(dim=1, keepdim=True)
    places = torch.arange(there_BL.shape[1], device=like.device, dtype=like.dtype)
    at_BL = places * ((side - 1) / (sizes_B1 - 1).clamp(min=1).to(like.dtype))
    known = torch.arange(side, device=like.device, dtype=like.dtype)
    weights_BLG = (1 - (at_BL[:, :, None] - known).abs()).clamp(min=0)
    return weights_BLG * there_BL[:, :, None]
