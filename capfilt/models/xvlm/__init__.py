"""X-VLM: its model and its public checkpoints."""

from __future__ import annotations

from capfilt.models.family import Family, FamilyCode
from capfilt.models.xvlm.config import XvlmConfig


def _code() -> FamilyCode:
    from capfilt.models.layers.bert import TEXT_BLOCK
    from capfilt.models.layers.swin import SWIN_BLOCK
    from capfilt.models.layers.vit import VISION_BLOCK
    from capfilt.models.xvlm.checkpoint import NOT_MODEL, XvlmTh, continued, text_from, vision_from
    from capfilt.models.xvlm.model import Xvlm

    return FamilyCode(
        build=Xvlm,
        blocks=(SWIN_BLOCK, VISION_BLOCK, TEXT_BLOCK),
        continued=continued,
        initial={"vision": vision_from, "text": text_from},
        original=XvlmTh(),
        ignored=NOT_MODEL,
    )


XVLM = Family(name="xvlm", config=XvlmConfig, load=_code, written_as="pth")

__all__ = ["XVLM"]
