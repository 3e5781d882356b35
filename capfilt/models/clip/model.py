"""CLIP (arXiv 2103.00020): a ViT and a text stack that reads left to right, compared by the cosine of two projections.

A text is its state at <|endoftext|>, which has the highest id of all: what stands behind it changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from capfilt.models.checkpoints.files import Tensors
from capfilt.models.clip.config import ClipConfig
from capfilt.models.interface import Model
from capfilt.models.layers.bert import check_length
from capfilt.models.layers.block import PreNormBlock
from capfilt.models.layers.precision import unit
from capfilt.models.layers.vit import VisionTransformer


class CausalTextTransformer(nn.Module):
    """Texts [B, T] -> states [B, T, width]."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        text = config.text
        self.words = nn.Embedding(text.vocab_size, text.width)
        self.positions = nn.Parameter(torch.zeros(1, text.max_positions, text.width))
        shape = (text.width, text.heads, text.hidden)
        self.blocks = nn.ModuleList(
            PreNormBlock(shape, text.layer_norm_eps, config.activation, causal=True) for _ in range(text.depth)
        )
        self.norm = nn.LayerNorm(text.width, eps=text.layer_norm_eps)

    def forward(self, ids_BT: Tensor) -> Tensor:
        T = ids_BT.shape[1]
        check_length(T, self.positions.shape[1])
        x_BTD = self.words(ids_BT) + self.positions[:, :T]
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.norm(x_BTD)


class Clip(Model):
    """Two towers. Of an image the [CLS] token is kept alone, of a text its last state."""

    config: ClipConfig
    vectors = ("vision.cls",)

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.config = config
        self.vision = VisionTransformer(config.vision.model_copy(update={"activation": config.activation}))
        self.text = CausalTextTransformer(config)
        self.image_projection = nn.Linear(config.vision.width, config.projection, bias=False)
        self.text_projection = nn.Linear(config.text.width, config.projection, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)))
        self._initialise()

    def _initialise(self) -> None:
        """Fresh weights as OpenAI's code draws those of the text stack; here the ViT's too, as transformers does."""
        for tower in (self.vision, self.text):
            width, depth = tower.positions.shape[-1], len(tower.blocks)
            for block in tower.blocks:
                assert isinstance(block, PreNormBlock)
                deviations = {
                    block.attention.qkv: width**-0.5,
                    block.attention.out: (2 * depth * width) ** -0.5,
                    block.feed_forward.up: (2 * width) ** -0.5,
                    block.feed_forward.down: (2 * depth * width) ** -0.5,
                }
                for linear, deviation in deviations.items():
                    nn.init.normal_(linear.weight, std=deviation)
                    nn.init.zeros_(linear.bias)
        for tensor, deviation in (
            (self.vision.cls, self.config.vision.width**-0.5),
            (self.vision.positions, self.config.vision.width**-0.5),
            (self.image_projection.weight, self.config.vision.width**-0.5),
            (self.text.words.weight, 0.02),
            (self.text.positions, 0.01),
            (self.text_projection.weight, self.config.text.width**-0.5),
        ):
            nn.init.normal_(tensor, std=deviation)

    @property
    def vision_modules(self) -> list[nn.Module]:
        return [self.vision]

    def recompute_vision(self, blocks: int) -> None:
        self.vision.recompute = blocks

    def adapt(self, tensors: Tensors) -> None:
        """Interpolate a saved model's positions to this one's picture size, in place, as open_clip does."""
        self.config.resize_positions(tensors, antialias=True)

    def encode_image(self, images_B3SS: Tensor) -> Tensor:
        """Pictures [B, 3, S, S] -> their [CLS] tokens [B, 1, vision width]; `vision` gives all tokens."""
        return self.vision(images_B3SS)[:, :1]

    def encode_text(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Texts -> their states at <|endoftext|> [B, 1, text width]; the mask says nothing that the ids do not."""
        states, ends = self.text(ids_BT), ids_BT.argmax(dim=1)
        last: Tensor = states[torch.arange(len(ids_BT), device=ids_BT.device), ends]
        return last[:, None]

    def encode_cls(self, ids_BT: Tensor, lengths: Sequence[int]) -> Tensor:
        """As `encode_text`."""
        return self.encode_text(ids_BT, ids_BT)

    def project_image(self, tokens_BND: Tensor) -> Tensor:
        """[CLS] tokens -> unit vectors [B, projection], fp32 at least, under autocast too."""
        return unit(self.image_projection(tokens_BND[:, 0]))

    def project_text(self, states_BTD: Tensor) -> Tensor:
        """States at the end of texts [B, 1, D] -> unit vectors [B, projection], fp32 at least, under autocast too."""
        return unit(self.text_projection(states_BTD[:, 0]))
