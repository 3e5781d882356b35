"""ALBEF's architecture as a YAML of `models/albef/` describes it."""

from __future__ import annotations

from typing import Literal, Self

from capfilt.data.text.language_tokenizer import TokenizerKind
from capfilt.models.architecture import ModelRole
from capfilt.models.layers.config import FusionTextConfig
from capfilt.models.layers.towers import ComparingConfig


class AlbefConfig(ComparingConfig):
    """An architecture of the family: what a YAML of `models/albef/` says (ALBEF section 3.1)."""

    family: Literal["albef"] = "albef"
    text: FusionTextConfig

    @property
    def capabilities(self) -> frozenset[str]:
        """What a model can do; a filter has no head that guesses hidden words."""
        guesses = {"unmask"} if "decoder" in self.text.roles else set()
        return frozenset({"encode_image", "encode_text", "fuse"} | guesses)

    @property
    def heatmap_layer(self) -> int:
        """A third of the way up the fusion encoder: 8 of 0 to 11, as ALBEF's grounding has it."""
        return self.fusion_layers[len(self.fusion_layers) // 3]

    @property
    def tokenizer_kind(self) -> TokenizerKind:
        return "open-bert"

    def for_role(self, role: ModelRole) -> Self:
        """The same without the head that guesses hidden words."""
        return self.changed(roles=("encoder",))
