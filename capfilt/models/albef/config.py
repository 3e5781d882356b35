"""ALBEF's architecture as a YAML of `models/albef/` describes it."""

from __future__ import annotations

from typing import Literal, Self

from capfilt.data.text.language_tokenizer import TokenizerKind
from capfilt.models.architecture import ModelRole
from capfilt.models.layers.config import FusionTextConfig
from capfilt.models.layers.limits import Temperature, Width
from capfilt.models.layers.towers import TowersConfig


class AlbefConfig(TowersConfig):
    """An architecture of the family: what a YAML of `models/albef/` says (ALBEF section 3.1)."""

    family: Literal["albef"] = "albef"
    text: FusionTextConfig
    projection: Width = 256
    """Width of the space where images and texts are compared."""
    temperature: Temperature = 0.07
    """Initial temperature of ITC; learned."""

    @property
    def capabilities(self) -> frozenset[str]:
        """What a model can do; a filter has no head that guesses hidden words."""
        guesses = {"unmask"} if "decoder" in self.text.roles else set()
        return frozenset({"encode_image", "encode_text", "fuse"} | guesses)

    @property
    def fusion_layers(self) -> range:
        return range(self.text.fusion_layer, self.text.depth) if "fuse" in self.capabilities else range(0)

    @property
    def heatmap_layer(self) -> int:
        """A third of the way up the fusion encoder: 8 of 0 to 11, as ALBEF's grounding has it."""
        return self.fusion_layers[len(self.fusion_layers) // 3]

    @property
    def tokenizer_kind(self) -> TokenizerKind:
        return "open-bert"

    @property
    def feature_width(self) -> int:
        return self.projection

    def for_role(self, role: ModelRole) -> Self:
        """The same without the head that guesses hidden words."""
        return self.changed(roles=("encoder",))
