"""CLIP: its model, and its checkpoints in the layouts of transformers, open_clip and OpenAI."""

from __future__ import annotations

from capfilt.data.images.preprocess import CLIP_PREPROCESS
from capfilt.models.clip.config import ClipConfig
from capfilt.models.family import Family, FamilyCode


def _code() -> FamilyCode:
    from capfilt.models.clip.checkpoint import IGNORED, ClipTransformers, OpenAiFile, OpenClipFolder
    from capfilt.models.clip.model import Clip
    from capfilt.models.layers.vit import VISION_BLOCK

    return FamilyCode(
        build=Clip,
        blocks=(VISION_BLOCK,),
        transformers=ClipTransformers(),
        original=OpenAiFile(),
        open_clip=OpenClipFolder(),
        ignored=IGNORED,
    )


CLIP = Family(name="clip", config=ClipConfig, load=_code, preprocess=CLIP_PREPROCESS)

__all__ = ["CLIP"]
