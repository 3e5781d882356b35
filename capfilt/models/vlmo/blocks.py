"""VLMo's blocks: attention that texts and images share, and a feed-forward expert for each (VLMo section 3.2).

Where a text stands beside an image, the expert of texts reads the first rows and that of images the others; in the last
blocks one expert reads all. Keys have no bias. One table of relative positions serves all blocks; its text offsets are
key - query, its image offsets query - key, as in the released code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capfilt.models.layers.attention import FeedForward, merge_heads, split_heads
from capfilt.models.layers.packed_linear import linear
from capfilt.models.layers.precision import at_least_fp32
from capfilt.models.layers.relative_positions import offset_index, resize_offsets
from capfilt.models.vlmo.config import BlocksConfig

Modality = Literal["text", "image", "fused"]
"""What a pass reads: a text, an image, or both; also one of them by the experts that read both."""
IMAGE_EXTRA, CROSS, TEXT_EXTRA = 3, 2, 3
"""Rows of the table behind its offsets: of an image's [CLS], of text to image and back, of a text's [CLS]."""


class SharedAttention(nn.Module):
    """Self-attention with biases of queries and values alone; scores are taken in fp32."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.query_bias = nn.Parameter(torch.zeros(width))
        self.value_bias = nn.Parameter(torch.zeros(width))
        self.out = nn.Linear(width, width)

    def forward(self, x_BND: Tensor, bias_HNN: Tensor | None, mask_BN: Tensor | None) -> Tensor:
        """Attend; `bias_HNN` is added to scores, and where `mask_BN` is False nothing is seen."""
        bias = torch.cat([self.query_bias, torch.zeros_like(self.query_bias), self.value_bias])
        qkv = linear(self.qkv, x_BND, bias)
        q, k, v = (split_heads(part, self.heads) for part in qkv.chunk(3, dim=-1))
        with torch.autocast(x_BND.device.type, enabled=False):
            scores = at_least_fp32(q * q.shape[-1] ** -0.5) @ at_least_fp32(k).transpose(-2, -1)
            if bias_HNN is not None:
                scores = scores + bias_HNN
            if mask_BN is not None:
                scores = scores.masked_fill(~mask_BN[:, None, None, :], -torch.inf)
            y = scores.softmax(dim=-1).to(v.dtype) @ v
        return self.out(merge_heads(y))


class Expert(nn.Module):
    """A pre-norm feed-forward branch."""

    matrices = ("norm.weight",)
    """In the released code these decay: it spares norms by names that do not match those of experts."""

    def __init__(self, config: BlocksConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config.width, config.hidden)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.feed_forward(self.norm(x_BND))


class MultiwayBlock(nn.Module):
    """One block. `depth_3B11` is what stochastic depth drew for attention, the (text) expert, and that of images."""

    def __init__(self, config: BlocksConfig, fused: bool):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.attention = SharedAttention(config.width, config.heads)
        names = ("text", "image", "fused") if fused else ("text", "image")
        self.experts = nn.ModuleDict({name: Expert(config) for name in names})
        scale = config.layer_scale
        self.attention_scale = None if scale is None else nn.Parameter(torch.full((config.width,), scale))
        self.expert_scale = None if scale is None else nn.Parameter(torch.full((config.width,), scale))
        self.matrices = () if scale is None else ("attention_scale", "expert_scale")

    def forward(
        self,
        x_BND: Tensor,
        modality: Modality,
        texts: int,
        bias_HNN: Tensor | None,
        mask_BN: Tensor | None,
        depth_3B11: Tensor | None,
    ) -> Tensor:
        """Rows -> rows, of which the first `texts` are of texts where `modality` is "fused"."""
        branch = self.attention(self.attention_norm(x_BND), bias_HNN, mask_BN)
        x_BND = x_BND + _scaled(branch, self.attention_scale, depth_3B11, 0)
        if modality != "fused" or "fused" in self.experts:
            return x_BND + _scaled(self.experts[modality](x_BND), self.expert_scale, depth_3B11, 1)
        text, image = x_BND[:, :texts], x_BND[:, texts:]
        text = text + _scaled(self.experts["text"](text), self.expert_scale, depth_3B11, 1)
        image = image + _scaled(self.experts["image"](image), self.expert_scale, depth_3B11, 2)
        return torch.cat([text, image], dim=1)


def _scaled(branch_BND: Tensor, scale_D: Tensor | None, depth_3B11: Tensor | None, which: int) -> Tensor:
    branch_BND = branch_BND if scale_D is None else scale_D * branch_BND
    return branch_BND if depth_3B11 is None else branch_BND * depth_3B11[which]


class RelativePositions(nn.Module):
    """What is added to the scores of every head of every block.

    Rows of the table: (2 side - 1)^2 image offsets, 3 of an image's [CLS], text to image, image to text,
    2 longest - 3 text offsets, 3 of a text's [CLS]; columns: heads of the first block, of the second, ...
    """

    vectors = ("table",)
    """No weight decay, as in the released code, where vectors are spared."""

    def __init__(self, config: BlocksConfig, longest: int):
        super().__init__()
        self.side, self.longest, self.depth = config.side, longest, config.depth
        rows = _image_rows(self.side) + CROSS + 2 * self.longest
        self.table = nn.Parameter(torch.zeros(rows, config.heads * config.depth))

    def forward(self, texts: int, image: bool) -> Sequence[Tensor]:
        """For each block [H, N, N], of N rows: `texts` of a text, then those of an image if there is one."""
        device = self.table.device
        if not texts:
            index = image_index(self.side, device)
        elif not image:
            index = text_index(texts, self.longest, self.side, device)
        else:
            index = joint_index(texts, self.longest, self.side, device)
        bias_NNC = F.embedding(index, at_least_fp32(self.table))
        return bias_NNC.permute(2, 0, 1).contiguous().chunk(self.depth)


def image_index(side: int, device: torch.device | None = None) -> Tensor:
    """Rows of the table for [CLS] and side x side patches, [N, N] from query to key: offsets are query - key."""
    return _with_cls(offset_index(side, device), (2 * side - 1) ** 2)


def text_index(length: int, longest: int, side: int, device: torch.device | None = None) -> Tensor:
    """Rows of the table for the tokens of a text, [T, T] from query to key: offsets are key - query; [CLS] has none."""
    place = torch.arange(length - 1, device=device)
    before = _image_rows(side) + CROSS
    return _with_cls(place[None, :] - place[:, None] + before + longest - 2, before + 2 * longest - TEXT_EXTRA)


def joint_index(length: int, longest: int, side: int, device: torch.device | None = None) -> Tensor:
    """Rows of the table for a text and then an image: between the two one number each way."""
    text, image = text_index(length, longest, side, device), image_index(side, device)
    cross, N = _image_rows(side), len(image)
    of_text = torch.cat([text, text.new_full((length, N), cross)], dim=1)
    return torch.cat([of_text, torch.cat([text.new_full((N, length), cross + 1), image], dim=1)])


def _image_rows(side: int) -> int:
    return (2 * side - 1) ** 2 + IMAGE_EXTRA


def _with_cls(offsets_NN: Tensor, end: int) -> Tensor:
    """A first row for what [CLS] sees, a first column for who sees it: the table's rows from `end` on."""
    index = F.pad(offsets_NN, (1, 0, 1, 0))
    index[0, :], index[:, 0], index[0, 0] = end, end + 1, end + 2
    return index


def resize_relative(table_RC: Tensor, side: int, text_rows: int) -> Tensor:
    """Interpolate a table's image offsets to pictures of `side` x `side` patches, as BEiT does: a cubic spline through
    offsets whose distances grow geometrically to those of the new picture. `text_rows`: those behind, kept as they are.
    """
    kept = table_RC[-(IMAGE_EXTRA + text_rows) :]
    old, new = round((len(table_RC) - len(kept)) ** 0.5), 2 * side - 1
    if old == new:
        return table_RC
    return torch.cat([resize_offsets(table_RC[: old * old], side), kept])
