"""X-VLM: a vision tower, and BERT whose upper layers attend to an image or to a part of it (X-VLM section 3.1).

A picture is encoded once, whatever the number of its regions. Of a Swin a region has the image's own tokens with a
[CLS] of its own and a mask; of a ViT the last blocks run again, over what is in the region. Where in the image a text
is, is computed from the text beside the whole image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from capfilt.models.interface import Model
from capfilt.models.layers.config import SwinConfig
from capfilt.models.layers.image_context import ImageContext
from capfilt.models.layers.precision import at_least_fp32
from capfilt.models.layers.swin import SwinTransformer
from capfilt.models.layers.towers_model import TowersModel
from capfilt.models.layers.vit import VisionTransformer
from capfilt.models.xvlm.config import RegionVitConfig, XvlmConfig


class Regions(NamedTuple):
    """Parts of pictures, R of them; a whole picture is one too."""

    image_R: Tensor
    """The picture that each is a part of: its number among the pictures."""
    seen_RN: Tensor
    """1 for the tokens of the picture that are in the part, 0 for others; [CLS] is always 1."""


class RegionVit(VisionTransformer):
    """A ViT whose last blocks run over parts of pictures as well, where no token sees what is not in its part."""

    config: RegionVitConfig

    def encode_regions(self, images_B3SS: Tensor, image_R: Tensor, seen_RN: Tensor) -> tuple[Tensor, Tensor]:
        """As a Swin's: the tokens of R parts of pictures, and for each those of its whole picture; two of [R, N, D]."""
        first = len(self.blocks) - self.config.region_blocks
        x_BND = self.run_blocks(self.embed(images_B3SS), range(first))
        seen = torch.cat([seen_RN.bool(), seen_RN.new_ones(x_BND.shape[:2], dtype=torch.bool)])[:, None, None]
        x_BND = torch.cat([x_BND.index_select(0, image_R), x_BND])
        x_BND = self.norm(self.run_blocks(x_BND, range(first, len(self.blocks)), seen))
        return x_BND[: len(image_R)], x_BND[len(image_R) :].index_select(0, image_R)


class Xvlm(TowersModel):
    """X-VLM, with the heads that its roles need."""

    config: XvlmConfig
    entry_points = (*Model.entry_points, "fuse_states", "fuse_hidden", "unmask", "predict_box", "encode_regions")

    def __init__(self, config: XvlmConfig):
        vision = config.vision
        super().__init__(config, SwinTransformer(vision) if isinstance(vision, SwinConfig) else RegionVit(vision))
        if config.compares:
            self.add_comparing_heads(head)
        if config.grounds:
            self.box_head = head(config.text.width, 4)

    @property
    def matrices(self) -> tuple[str, ...]:
        """The norms of the heads, which decay in X-VLM's own code: it spares norms by names that these have not."""
        return tuple(f"{head}.1.weight" for head in ("match_head", "box_head") if hasattr(self, head))

    def encode_regions(self, images_B3SS: Tensor, regions: Regions) -> tuple[Tensor, Tensor]:
        """Pictures [B, 3, S, S] -> the tokens of parts of them, and for each part those of its whole picture; two of
        [R, N, D]."""
        parts, whole = self.vision.encode_regions(images_B3SS, *regions)
        return parts, whole

    def region_context(self, parts_RND: Tensor, regions: Regions) -> ImageContext:
        """The tokens of parts of pictures -> what `fuse` and `unmask` attend to: what is in the part."""
        seen = regions.seen_RN.bool()[:, None, None]
        return self.image_context(parts_RND, "encoder")._replace(mask=seen)

    def predict_box(self, states_BTD: Tensor) -> Tensor:
        """States of texts fused with whole images -> where the text is: boxes [B, 4] (center x, center y, width,
        height) in shares of the picture."""
        return at_least_fp32(self.box_head(states_BTD[:, 0])).sigmoid()

    def fuse_hidden(self, ids_BT: Tensor, mask_BT: Tensor, image: ImageContext, places_BK: Tensor) -> Tensor:
        """As `unmask`, logits at K positions of each text alone, [B, K, V]."""
        states = self.text(ids_BT, "encoder", mask_BT, image)
        return self.text.logits(states.gather(1, places_BK[..., None].expand(-1, -1, states.shape[2])))


def head(width: int, outputs: int) -> nn.Sequential:
    """What stands on a fused [CLS]: through twice the width, normalised."""
    return nn.Sequential(nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, outputs))
