"""BLIP's MED: a mixture of encoder and decoder (BLIP, section 3.1), with the heads that its three objectives need.

It can encode_image, encode_text, fuse ([ENC]) and decode ([DEC]), and has two projections into the space where cosines
are taken. The model replaces the first token of a text itself, so that no caller can forget it ([ENC] for
matching is what training used; several public inference scripts leave [CLS] there and score differently).
"""

from __future__ import annotations

import torch
from torch import Tensor

from capfilt.models.blip.config import BlipConfig
from capfilt.models.layers.image_context import ImageContext
from capfilt.models.layers.towers_model import TowersModel
from capfilt.models.layers.vit import VisionTransformer


class Blip(TowersModel):
    """MED. With both roles it is the pretrained model; with one it is a captioner (decoder) or a filter (encoder)."""

    config: BlipConfig

    def __init__(self, config: BlipConfig):
        super().__init__(config, VisionTransformer(config.vision))
        if config.compares:
            self.add_comparing_heads()

    def question_context(self, tokens_BND: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> ImageContext:
        """Questions beside the image tokens of their pictures -> what their answers attend to (BLIP section 5.3)."""
        states = self.fuse(ids_BT, mask_BT, self.image_context(tokens_BND, "encoder"))
        return self.text.image_context(states, "decoder")._replace(mask=mask_BT.bool()[:, None, None])

    def fused_ids(self, ids_BT: Tensor) -> Tensor:
        """[ENC] first, as in training, or [CLS]."""
        return replace_first(ids_BT, self.config.text.enc) if self.config.itm_token == "enc" else ids_BT

    def decoded_ids(self, ids_BT: Tensor) -> Tensor:
        """[DEC] first."""
        return replace_first(ids_BT, self.config.text.dec)


def replace_first(ids_BT: Tensor, token: int) -> Tensor:
    """A copy of the ids with `token` in place of the first, which is [CLS] as texts arrive."""
    return torch.cat([torch.full_like(ids_BT[:, :1], token), ids_BT[:, 1:]], dim=1)
