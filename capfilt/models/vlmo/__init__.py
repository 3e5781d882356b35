"""VLMo: its model and its public checkpoints."""

from __future__ import annotations

from capfilt.data.images.preprocess import Preprocess
from capfilt.models.family import Family, FamilyCode
from capfilt.models.vlmo.config import VlmoConfig


def _code() -> FamilyCode:
    from capfilt.models.vlmo.checkpoint import IGNORED, VlmoPt, continued, vision_from
    from capfilt.models.vlmo.model import MULTIWAY_BLOCK, Vlmo

    return FamilyCode(
        build=Vlmo,
        blocks=(MULTIWAY_BLOCK,),
        continued=continued,
        initial={"vision": vision_from},
        original=VlmoPt(),
        ignored=IGNORED,
    )


HALF = (0.5, 0.5, 0.5)
VLMO = Family(name="vlmo", config=VlmoConfig, load=_code, written_as="pth", preprocess=Preprocess(mean=HALF, std=HALF))

__all__ = ["VLMO"]
