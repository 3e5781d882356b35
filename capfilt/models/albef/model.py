"""ALBEF: a ViT, six layers of BERT that read a text, and six that fuse it with the image (ALBEF section 3.1).

Images and texts are compared before they are fused. Fusion goes on from the states of the text alone, so that ITM reads
no text twice; MLM reads the text with its hidden tokens through all twelve layers.
"""

from __future__ import annotations

from capfilt.models.albef.config import AlbefConfig
from capfilt.models.interface import Model
from capfilt.models.layers.towers_model import TowersModel
from capfilt.models.layers.vit import VisionTransformer


class Albef(TowersModel):
    """ALBEF, with the head that guesses hidden words where its text stack has it."""

    config: AlbefConfig
    entry_points = (*Model.entry_points, "fuse_states", "unmask")

    def __init__(self, config: AlbefConfig):
        super().__init__(config, VisionTransformer(config.vision))
        self.add_comparing_heads()
