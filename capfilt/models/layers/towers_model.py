"""A vision tower beside a stack of text layers that attend to it: what models of BLIP, ALBEF and X-VLM do alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from capfilt.models.checkpoints.files import Tensors
from capfilt.models.interface import Model
from capfilt.models.layers.attention import Attention
from capfilt.models.layers.bert import Cache, Head, OutputLayer, TextTransformer
from capfilt.models.layers.config import APART, Role
from capfilt.models.layers.image_context import DecoderCache, ImageContext
from capfilt.models.layers.precision import unit


class TowersModel(Model):
    """The towers; a family adds its heads, and says what stands first in a text that is fused or decoded."""

    config: Any
    """A TowersConfig, of the family's class."""
    image_projection: nn.Linear
    text_projection: nn.Linear
    match_head: nn.Module
    vision: Any
    """A vision tower: pictures [B, 3, S, S] -> tokens [B, N, D]; `recompute` is how many blocks compute again."""
    temperature: nn.Parameter

    def __init__(self, config: Any, vision: nn.Module):
        super().__init__()
        self.config = config
        self.vision = vision
        self.text = TextTransformer(config.text, config.vision.width)

    def add_comparing_heads(self, match: Callable[[int, int], nn.Module] = nn.Linear) -> None:
        """Give it two projections into the space where cosines are taken, their temperature, and a head that matches,
        which `match` makes of (width, outputs)."""
        vision, text, space = self.config.vision.width, self.config.text.width, self.config.projection
        self.image_projection, self.text_projection = nn.Linear(vision, space), nn.Linear(text, space)
        self.match_head = match(text, 2)
        self.temperature = nn.Parameter(torch.tensor(self.config.temperature))

    @property
    def vision_modules(self) -> list[nn.Module]:
        return [self.vision]

    @property
    def shares_image_context(self) -> bool:
        return "cross_attention" not in APART[self.config.text.share]

    def recompute_vision(self, blocks: int) -> None:
        self.vision.recompute = blocks

    def adapt(self, tensors: Tensors) -> None:
        self.config.resize_positions(tensors)

    def encode_image(self, images_B3SS: Tensor) -> Tensor:
        """Pictures [B, 3, S, S] -> tokens [B, N, vision width]; token 0 is [CLS]."""
        return self.vision(images_B3SS)

    def image_context(self, tokens_BND: Tensor, role: Role, prompt: Sequence[int] = ()) -> ImageContext:
        return self.text.image_context(tokens_BND, role)

    def tokens_instead(self, tokens_BND: Tensor, queries: int) -> ImageContext | None:
        return self.text.tokens_instead(tokens_BND, "decoder", queries)

    def image_context_modules(self, role: Role) -> list[nn.Module]:
        return self.text.key_projections(role)

    @property
    def output_layer(self) -> OutputLayer:
        return self.text.output_layer()

    @property
    def decoder_stack(self) -> TextTransformer:
        return self.text

    def encode_text(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Texts -> states [B, T, D], of the layers that read a text alone."""
        return self.text(ids_BT, "encoder", mask_BT)

    def project_image(self, tokens_BND: Tensor) -> Tensor:
        """Image tokens -> unit vectors [B, projection], fp32 under autocast too, float64 in float64."""
        return unit(self.image_projection(tokens_BND[:, 0]))

    def project_text(self, states_BTD: Tensor) -> Tensor:
        """Text states -> unit vectors [B, projection], fp32 under autocast too, float64 in float64."""
        return unit(self.text_projection(states_BTD[:, 0]))

    def fused_ids(self, ids_BT: Tensor) -> Tensor:
        """The ids that `fuse` reads; [B, T] with [CLS] first, as they come, or with another token there."""
        return ids_BT

    def decoded_ids(self, ids_BT: Tensor) -> Tensor:
        """The ids that `decode` reads, likewise."""
        return ids_BT

    def fuse(self, ids_BT: Tensor, mask_BT: Tensor, image: ImageContext) -> Tensor:
        return self.text(self.fused_ids(ids_BT), "encoder", mask_BT, image)

    def image_attention(self, layer: int) -> Attention:
        return self.text.layers[layer].cross_attention.of("encoder").block  # type: ignore[union-attr, operator]

    def fuse_states(self, states_BTD: Tensor, mask_BT: Tensor, image: ImageContext) -> Tensor:
        """States of texts that `encode_text` gave -> states beside images [B, T, D], where the one is the beginning of
        the other."""
        return self.text.fuse_states(states_BTD, mask_BT, image)

    def encode_cls(self, ids_BT: Tensor, lengths: Sequence[int]) -> Tensor:
        return self.text.cls_states(ids_BT, lengths)

    def fuse_cls(self, ids_BT: Tensor, lengths: Sequence[int], image: ImageContext, counts: Sequence[int]) -> Tensor:
        return self.text.cls_states(self.fused_ids(ids_BT), lengths, image, counts)

    def match(self, states_BTD: Tensor) -> Tensor:
        return self.match_head(states_BTD[:, 0])

    def unmask(self, ids_BT: Tensor, mask_BT: Tensor, image: ImageContext) -> Tensor:
        return self.text.logits(self.text(ids_BT, "encoder", mask_BT, image))

    def decode(self, ids_BT: Tensor, mask_BT: Tensor | None, image: ImageContext) -> Tensor:
        return self.text.logits(self.text(self.decoded_ids(ids_BT), "decoder", mask_BT, image))

    def cache(self, rows: int, length: int, image: ImageContext) -> Cache:
        return Cache(self.config.text, rows, length, image.tensors[0])

    def decode_step(self, ids_BT: Tensor, image: ImageContext, cache: DecoderCache, head: Head | None = None) -> Tensor:
        assert isinstance(cache, Cache), "the cache of another model"
        states = self.text(ids_BT, "decoder", None, image, cache)
        return self.text.logits(states[:, -1:])[:, 0] if head is None else head(states[:, -1])
