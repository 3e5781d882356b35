"""BLIP: its model, transformers' config of it, and its public checkpoints."""

from capfilt.models.blip.checkpoint import IGNORED, BlipPth, BlipTransformers, continued, text_from, vision_from
from capfilt.models.blip.model import Blip, BlipConfig
from capfilt.models.interface import Family
from capfilt.models.layers.bert import TEXT_BLOCK
from capfilt.models.layers.vit import VISION_BLOCK

BLIP = Family(
    name="blip",
    config=BlipConfig,
    build=Blip,
    blocks=(VISION_BLOCK, TEXT_BLOCK),
    continued=continued,
    initial={"vision": vision_from, "text": text_from},
    transformers=BlipTransformers(),
    original=BlipPth(),
    ignored=IGNORED,
)

__all__ = ["BLIP"]
