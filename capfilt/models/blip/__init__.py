"""BLIP: its model, transformers' config of it, and its public checkpoints."""

from __future__ import annotations

from capfilt.models.blip.config import BlipConfig
from capfilt.models.family import Family, FamilyCode


def _code() -> FamilyCode:
    from capfilt.models.blip.checkpoint import BlipPth, BlipTransformers, continued, text_from, vision_from
    from capfilt.models.blip.model import Blip
    from capfilt.models.checkpoints.key_maps import NOT_MODEL
    from capfilt.models.layers.bert import TEXT_BLOCK
    from capfilt.models.layers.vit import VISION_BLOCK

    return FamilyCode(
        build=Blip,
        blocks=(VISION_BLOCK, TEXT_BLOCK),
        continued=continued,
        initial={"vision": vision_from, "text": text_from},
        transformers=BlipTransformers(),
        original=BlipPth(),
        ignored=NOT_MODEL,
    )


BLIP = Family(name="blip", config=BlipConfig, load=_code)

__all__ = ["BLIP"]
