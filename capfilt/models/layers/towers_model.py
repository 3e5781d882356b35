"""A vision tower beside a stack of text layers that attend to it: what models of BLIP, ALBEF and X-VLM do alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from capfilt.models.checkpoints.files import Tensors
from capfilt.models.interface import Model
from capfilt.models.layers.attention import Attention
from capfilt.models.layers.bert import Cache, Head, OutputLayer, TextTransformer
from capfilt.models.layers.config import APART, Role
from capfilt.models.layers.image_context import DecoderCache, ImageContext
from capfilt.models.layers.precision import at_least_fp32


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
        tokens: Tensor = self.vision(images_B3SS)
        return tokens

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
        states: Tensor = self.text(ids_BT, "encoder", mask_BT)
        return states

    def project_image(self, tokens_BND: Tensor) -> Tensor:
        """Image tokens -> unit vectors [B, projection], fp32 under autocast too, float64 in float64."""
        return F.normalize(at_least_fp32(self.image_projection(tokens_BND[:, 0])), dim=-1)

    def project_text(self, states_BTD: Tensor) -> Tensor:
        """Text states -> unit vectors [B, projection], fp32 under autocast too, float64 in float64."""
        return F.normalize(at_least_fp32(self.text_projection(states_BTD[:, 0])), dim=-1)

    def similarity(self, image_IP: Tensor, text_TP: Tensor) -> Tensor:
        return image_IP @ text_TP.T

    def fused_ids(self, ids_BT: Tensor) -> Tensor:
        """The ids that `fuse` reads; [B, T] with [CLS] first, as they come, or with another token there."""
        return ids_BT

    def decoded_ids(self, ids_BT: Tensor) -> Tensor:
        """The ids that `decode` reads, likewise."""
        return ids_BT

    def fuse(self, ids_BT: Tensor, mask_BT: Tensor, image: ImageContext) -> Tensor:
        states: Tensor = self.text(self.fused_ids(ids_BT), "encoder", mask_BT, image)
        return states

    def image_attention(self, layer: int) -> Attention:
        attention: Attention = self.text.layers[layer].cross_attention.of("encoder").block  # type: ignore[union-attr, operator]
        return attention

    def fuse_states(self, states_BTD: Tensor, mask_BT: Tensor, image: ImageContext) -> Tensor:
        """States of texts that `encode_text` gave -> states beside images [B, T, D], where the one is the beginning of
        the other."""
        return self.text.fuse_states(states_BTD, mask_BT, image)

    def encode_cls(self, ids_BT: Tensor, lengths: Sequence[int]) -> Tensor:
        return self.text.cls_states(ids_BT, lengths)

    def fuse_cls(self, ids_BT: Tensor, lengths: Sequence[int], image: ImageContext, counts: Sequence[int]) -> Tensor:
        return self.text.cls_states(self.fused_ids(ids_BT), lengths, image, counts)

    def match(self, states_BTD: Tensor) -> Tensor:
        logits: Tensor = self.match_head(states_BTD[:, 0])
        return logits

    def decode(self, ids_BT: Tensor, mask_BT: Tensor | None, image: ImageContext) -> Tensor:
        return self.text.logits(self.text(self.decoded_ids(ids_BT), "decoder", mask_BT, image))

    def cache(self, rows: int, length: int, image: ImageContext) -> Cache:
        return Cache(self.config.text, rows, length, image.tensors[0])

    def decode_step(self, ids_BT: Tensor, image: ImageContext, cache: DecoderCache, head: Head | None = None) -> Tensor:
        assert isinstance(cache, Cache), "the cache of another model"
        states = self.text(ids_BT, "decoder", None, image, cache)
        return self.text.logits(states[:, -1:])[:, 0] if head is None else head(states[:, -1])
