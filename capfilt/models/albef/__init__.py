"""ALBEF: its model and its public checkpoints."""

from __future__ import annotations

from capfilt.models.albef.config import AlbefConfig
from capfilt.models.family import Family, FamilyCode


def _code() -> FamilyCode:
    from capfilt.models.albef.checkpoint import AlbefPth, continued, text_from, vision_from
    from capfilt.models.albef.model import Albef
    from capfilt.models.checkpoints.key_maps import NOT_MODEL
    from capfilt.models.layers.bert import TEXT_BLOCK
    from capfilt.models.layers.vit import VISION_BLOCK

    return FamilyCode(
        build=Albef,
        blocks=(VISION_BLOCK, TEXT_BLOCK),
        continued=continued,
        initial={"vision": vision_from, "text": text_from},
        original=AlbefPth(),
        ignored=NOT_MODEL,
    )


ALBEF = Family(name="albef", config=AlbefConfig, load=_code, written_as="pth")

__all__ = ["ALBEF"]
