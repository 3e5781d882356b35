"""ViLT: its model, transformers' classes of it, and its own checkpoints."""

from __future__ import annotations

from capfilt.data.images.preprocess import VILT_PREPROCESS
from capfilt.models.family import Family, FamilyCode
from capfilt.models.vilt.config import ViltConfig


def _code() -> FamilyCode:
    from capfilt.models.layers.vit import VISION_BLOCK
    from capfilt.models.vilt.checkpoint import IGNORED, ViltCkpt, ViltTransformers, continued, vision_from
    from capfilt.models.vilt.model import Vilt

    return FamilyCode(
        build=Vilt,
        blocks=(VISION_BLOCK,),
        continued=continued,
        initial={"vision": vision_from},
        transformers=ViltTransformers(),
        original=ViltCkpt(),
        ignored=IGNORED,
    )


VILT = Family(name="vilt", config=ViltConfig, load=_code, preprocess=VILT_PREPROCESS)

__all__ = ["VILT"]
