"""The Swin transformer: a picture in, one token per patch of 32 px out, and before them a [CLS] that is their mean.

Blocks attend within windows, every second one within windows that are shifted by half their side; the picture is rolled
for that, so that a shifted window at the edge holds parts of two sides, which do not see each other. Shape letters: B
pictures, S side of the grid, W windows, M tokens of a window, H heads, D width.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capfilt.models.layers.attention import FeedForward, merge_heads, split_heads, stochastic_depth
from capfilt.models.layers.block import Block, initialise, recomputed
from capfilt.models.layers.config import SwinConfig
from capfilt.models.layers.relative_positions import offset_index, resize_offsets

HIDDEN_SCORE = -100.0
"""What is added to the scores of tokens that do not see each other, as in Swin's own code."""


class WindowAttention(nn.Module):
    """Self-attention within windows; what a head adds to a score depends on the offset between the two tokens."""

    vectors = ("offsets",)
    """No weight decay where vectors are spared: the released codes go by names, and this one has "bias" in it."""

    def __init__(self, width: int, heads: int, side: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.offsets = nn.Parameter(torch.zeros((2 * side - 1) ** 2, heads))
        nn.init.trunc_normal_(self.offsets, std=0.02)

    def forward(self, x_BWMD: Tensor, index_MM: Tensor, seen_WMM: Tensor | None) -> Tensor:
        """Windows [B, W, M, D] -> the same; `seen_WMM` is what is added where tokens do not see each other."""
        B, W, M, D = x_BWMD.shape
        qkv = self.qkv(x_BWMD.reshape(B * W, M, D))
        # Windows stand beside heads, so that the fused kernels take one mask for all pictures.
        q, k, v = (split_heads(part, self.heads).reshape(B, W * self.heads, M, -1) for part in qkv.chunk(3, dim=-1))
        bias = F.embedding(index_MM, self.offsets).permute(2, 0, 1).expand(W, -1, -1, -1)
        bias = bias if seen_WMM is None else bias + seen_WMM[:, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.flatten(0, 1)[None].to(q.dtype))
        return self.out(merge_heads(y.reshape(B * W, self.heads, M, -1))).view(B, W, M, D)


class SwinBlock(nn.Module):
    """One pre-norm block on a grid [B, S, S, D], in windows of `side`."""

    def __init__(self, config: SwinConfig, stage: int):
        super().__init__()
        width = config.embed << stage
        self.side = config.window
        self.attention_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attention = WindowAttention(width, config.stage_heads[stage], self.side)
        self.feed_forward_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(width, 4 * width)

    def forward(
        self, x_BSSD: Tensor, index_MM: Tensor, shift: int, seen_WMM: Tensor | None, depth_2B11: Tensor | None
    ) -> Tensor:
        B, S, _, D = x_BSSD.shape
        y = self.attention_norm(x_BSSD)
        y = y.roll((-shift, -shift), (1, 2)) if shift else y
        y = of_windows(self.attention(windows(y, self.side), index_MM, seen_WMM), S)
        y = (y.roll((shift, shift), (1, 2)) if shift else y).reshape(B, S * S, D)
        x_BND = x_BSSD.reshape(B, S * S, D)
        x_BND = x_BND + (y if depth_2B11 is None else y * depth_2B11[0])
        y = self.feed_forward(self.feed_forward_norm(x_BND))
        x_BND = x_BND + (y if depth_2B11 is None else y * depth_2B11[1])
        return x_BND.view(B, S, S, D)


SWIN_BLOCK = Block(SwinBlock)


class Merge(nn.Module):
    """Four tokens become one that is twice as wide: [B, S, S, D] -> [B, S / 2, S / 2, 2 D]."""

    def __init__(self, width: int, layer_norm_eps: float):
        super().__init__()
        self.norm = nn.LayerNorm(4 * width, eps=layer_norm_eps)
        self.reduce = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x_BSSD: Tensor) -> Tensor:
        four = [x_BSSD[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduce(self.norm(torch.cat(four, dim=-1)))


class Stage(nn.Module):
    """Some blocks, and the merge behind them; none behind the last stage."""

    def __init__(self, config: SwinConfig, stage: int):
        super().__init__()
        last = stage == len(config.depths) - 1
        self.blocks = nn.ModuleList(SwinBlock(config, stage) for _ in range(config.depths[stage]))
        self.merge = None if last else Merge(config.embed << stage, config.layer_norm_eps)


class SwinTransformer(nn.Module):
    """Pictures [B, 3, S, S] (normalised floats) -> tokens [B, 1 + patches, width]; token 0 is [CLS]."""

    def __init__(self, config: SwinConfig):
        super().__init__()
        self.config = config
        self.patches = nn.Conv2d(3, config.embed, config.patch_size, stride=config.patch_size)
        self.patch_norm = nn.LayerNorm(config.embed, eps=config.layer_norm_eps)
        self.stages = nn.ModuleList(Stage(config, stage) for stage in range(len(config.depths)))
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.rates = [config.drop_path * i / max(config.depth - 1, 1) for i in range(config.depth)]
        self.recompute = 0
        """How many of the last blocks keep no activations for the backward pass and compute them again."""
        self.apply(partial(initialise, std=config.init_std))

    def forward(self, images_B3SS: Tensor) -> Tensor:
        x_BND = self.patches(images_B3SS).permute(0, 2, 3, 1)
        x_BSSD = self.patch_norm(x_BND)
        side, number = self.config.window, 0
        index_MM = offset_index(side, x_BSSD.device)
        for stage in self.stages:
            shift = side // 2 if x_BSSD.shape[1] > side else 0
            seen_WMM = shifted_windows(x_BSSD, side, shift) if shift else None
            for n, block in enumerate(stage.blocks):  # type: ignore[arg-type]
                depth = stochastic_depth(x_BSSD, self.rates[number] if self.training else 0.0)
                args = (x_BSSD, index_MM, shift, seen_WMM, depth) if n % 2 else (x_BSSD, index_MM, 0, None, depth)
                number += 1
                x_BSSD = recomputed(number > self.config.depth - self.recompute, block, *args)
            x_BSSD = x_BSSD if stage.merge is None else stage.merge(x_BSSD)  # type: ignore[operator]
        x_BND = self.norm(x_BSSD.flatten(1, 2))
        return torch.cat([x_BND.mean(dim=1, keepdim=True), x_BND], dim=1)

    def encode_regions(self, images_B3SS: Tensor, image_R: Tensor, seen_RN: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures -> tokens of R parts of them, and for each those of its whole picture; two of [R, N, D].

        `image_R` is the picture that each is of. [CLS] of a part is the mean of the tokens that `seen_RN` (1 or 0, of
        all N) says are in it (X-VLM section 3.1).
        """
        whole_RND = self(images_B3SS).index_select(0, image_R)
        seen = seen_RN[:, 1:, None].to(whole_RND.dtype)
        cls_R1D = (seen * whole_RND[:, 1:]).sum(dim=1, keepdim=True) / seen.sum(dim=1, keepdim=True)
        return torch.cat([cls_R1D, whole_RND[:, 1:]], dim=1), whole_RND


def windows(x_BSSD: Tensor, side: int) -> Tensor:
    """A grid [B, S, S, D] -> its windows [B, W, side * side, D]."""
    B, S, _, D = x_BSSD.shape
    x = x_BSSD.view(B, S // side, side, S // side, side, D).transpose(2, 3)
    return x.reshape(B, (S // side) ** 2, side * side, D)


def of_windows(x_BWMD: Tensor, S: int) -> Tensor:
    """Windows [B, W, M, D] -> their grid [B, S, S, D]."""
    B, W, M, D = x_BWMD.shape
    side, across = round(M**0.5), round(W**0.5)
    return x_BWMD.view(B, across, across, side, side, D).transpose(2, 3).reshape(B, S, S, D)


def shifted_windows(x_BSSD: Tensor, side: int, shift: int) -> Tensor:
    """What is added to scores in windows of a rolled grid, [W, M, M]: a little less than nothing between tokens that
    came from different sides of the picture."""
    place = torch.arange(x_BSSD.shape[1], device=x_BSSD.device)
    part = (place >= len(place) - side).long() + (place >= len(place) - shift)
    label_WM = windows((3 * part[:, None] + part)[None, :, :, None], side)[0, :, :, 0]
    return (label_WM[:, :, None] != label_WM[:, None]).to(x_BSSD.dtype) * HIDDEN_SCORE


def resize_windows(tensors: dict[str, Tensor], side: int, prefix: str) -> None:
    """Interpolate a saved tower's tables of offsets to windows of `side` tokens, in place."""
    for name in [name for name in tensors if name.startswith(prefix) and name.endswith("attention.offsets")]:
        tensors[name] = resize_offsets(tensors[name], side)
