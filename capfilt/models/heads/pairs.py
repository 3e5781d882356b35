"""How a text is fused with two pictures at once (NLVR2), in each of the three ways of the public codes.

Every module here is called with the base that it extends, and holds no weight of it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from capfilt.models.interface import Model
from capfilt.models.layers.attention import Attention
from capfilt.models.layers.bert import Residual, TextLayer, TextTransformer, self_attention_mask
from capfilt.models.layers.towers_model import TowersModel

MERGED_FROM = 6
"""The first layer of BLIP that merges by a learned layer and not by the mean (models/nlvr_encoder.py)."""


def pair_of(base: Model) -> nn.Module:
    """What a base needs beside it to read two pictures; it begins as what the base has for one."""
    if not isinstance(base, TowersModel):
        return Joined()
    return Merged(base) if base.text.config.fusion_layer == 0 else Alternating(base)


class Joined(nn.Module):
    """Two passes of the base, one for each picture, side by side (ViLT section 4.3; VLMo)."""

    def encode_image(self, base: Model, images: Tensor) -> Tensor:
        """Pictures [2 B, ...], the left ones first -> image tokens, of which the base knows the side."""
        left, right = images.chunk(2)
        first, second = base.encode_image(left), base.encode_image(right, number=2)  # type: ignore[call-arg]
        return torch.cat([first, second])

    def forward(self, base: Model, tokens: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Image tokens [2 B, N, D] -> one vector of each text [B, 2 D]."""
        sides = (base.image_context(side, "encoder") for side in tokens.chunk(2))
        return torch.cat([base.summary(base.fuse(ids_BT, mask_BT, side)) for side in sides], dim=1)


class Alternating(nn.Module):
    """Each fusion layer twice: the base's own attends to the left picture, its copy to the right one, by keys and
    values of the base's layer (ALBEF section 5, NLVR2; X-VLM)."""

    def __init__(self, base: TowersModel):
        super().__init__()
        fusing = base.text.layers[base.text.config.fusion_layer :]
        self.layers = nn.ModuleList(copy.deepcopy(layer) for layer in fusing)
        for layer in self.layers:
            assert isinstance(layer, TextLayer)
            block: Any = layer.cross_attention.of("encoder").block
            del block.key, block.value

    def forward(self, base: TowersModel, tokens: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Image tokens [2 B, N, D] -> one vector of each text [B, D]."""
        text: TextTransformer = base.text
        x_BTD = base.encode_text(ids_BT, mask_BT)
        mask = self_attention_mask(x_BTD, mask_BT, causal=False)
        left, right = (base.image_context(side, "encoder").layers for side in tokens.chunk(2))
        for i, own in enumerate(text.layers[text.config.fusion_layer :]):
            for layer, image in ((own, left[i]), (self.layers[i], right[i])):
                x_BTD = layer(x_BTD, "encoder", layer.self_keys_values(x_BTD, "encoder"), mask, image)  # type: ignore[operator]
        return base.summary(x_BTD)


class Merge(nn.Module):
    """One of what two cross-attentions give: their mean, or a linear layer of both."""

    def __init__(self, width: int, learned: bool, init_std: float):
        super().__init__()
        self.linear = nn.Linear(2 * width, width) if learned else None
        if self.linear is not None:
            nn.init.normal_(self.linear.weight, std=init_std)
            nn.init.zeros_(self.linear.bias)

    def forward(self, left_BTD: Tensor, right_BTD: Tensor) -> Tensor:
        if self.linear is None:
            return (left_BTD + right_BTD) / 2
        return self.linear(torch.cat([left_BTD, right_BTD], dim=-1))


class Merged(nn.Module):
    """In every layer a cross-attention of its own to the right picture, merged with that to the left one (BLIP section
    5.4, figure 5)."""

    def __init__(self, base: TowersModel):
        super().__init__()
        crosses = [layer.cross_attention.of("encoder") for layer in base.text.layers]  # type: ignore[union-attr, operator]
        assert all(isinstance(cross, Residual) for cross in crosses)
        self.seconds = nn.ModuleList(copy.deepcopy(cross.block) for cross in crosses)
        config = base.text.config
        first = min(MERGED_FROM, config.depth // 2)
        self.merges = nn.ModuleList(Merge(config.width, n >= first, config.init_std) for n in range(config.depth))

    def forward(self, base: TowersModel, tokens: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Image tokens [2 B, N, D] -> one vector of each text [B, D]."""
        left_tokens, right_tokens = tokens.chunk(2)
        left = base.image_context(left_tokens, "encoder").layers
        x_BTD = base.text.embeddings.of("encoder")(base.fused_ids(ids_BT))
        mask = self_attention_mask(x_BTD, mask_BT, causal=False)
        for layer, of_left, second, merge in zip(base.text.layers, left, self.seconds, self.merges, strict=True):
            assert isinstance(layer, TextLayer)
            assert isinstance(second, Attention)
            images = of_left, second.keys_values(right_tokens)
            x_BTD = layer.fuse_both(x_BTD, layer.self_keys_values(x_BTD, "encoder"), mask, images, second, merge)
        return base.summary(x_BTD)
