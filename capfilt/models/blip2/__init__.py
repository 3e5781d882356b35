"""BLIP-2: Q-Former, frozen language model, and the checkpoints of transformers and of LAVIS."""

from __future__ import annotations

from capfilt.models.blip2.config import Blip2Config
from capfilt.models.family import Family, FamilyCode


def _code() -> FamilyCode:
    from capfilt.models.blip2.checkpoint import Blip2Transformers, continued, language_from, text_from, vision_from
    from capfilt.models.blip2.lavis import IGNORED, Lavis
    from capfilt.models.blip2.model import Blip2
    from capfilt.models.layers.vit import VISION_BLOCK

    return FamilyCode(
        build=Blip2,
        blocks=(VISION_BLOCK,),
        continued=continued,
        initial={"vision": vision_from, "text": text_from, "language": language_from},
        transformers=Blip2Transformers(),
        original=Lavis(),
        ignored=IGNORED,
    )


BLIP2 = Family(name="blip2", config=Blip2Config, load=_code)

__all__ = ["BLIP2"]
