"""CLIP's architecture as a YAML of `models/clip/` describes it."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import model_validator

from capfilt.models.architecture import alias
from capfilt.models.layers.config import Activation, TextStackConfig, VisionConfig
from capfilt.models.layers.limits import Epsilon, Positions, Temperature, Width
from capfilt.models.layers.towers import TowersConfig

CAPABILITIES = frozenset({"encode_image", "encode_text"})


class ClipVisionConfig(VisionConfig):
    """CLIP's ViT, with the defaults of it: norms before and behind the blocks, eps 1e-5, no bias of patches."""

    layer_norm_eps: Epsilon = 1e-5
    """What a LayerNorm adds to the variance."""
    patch_bias: bool = False
    """Whether patches are embedded with a bias."""
    pre_norm: bool = True
    """A LayerNorm between the embeddings and the first block."""


class ClipTextConfig(TextStackConfig):
    """CLIP's text stack: pre-norm blocks that read left to right. ViT-B's is 512 x 12 x 8."""

    max_positions: Positions = 77
    """Tokens of a text at most."""
    layer_norm_eps: Epsilon = 1e-5
    """What a LayerNorm adds to the variance."""


class ClipConfig(TowersConfig):
    """An architecture of the family: what a YAML of `models/clip/` says."""

    family: Literal["clip"] = "clip"
    """The family's name."""
    activation: Activation
    """Of both towers; no default. OpenAI's weights and open_clip's "-quickgelu" are of quick_gelu, most others gelu."""
    vision: ClipVisionConfig
    """The vision tower."""
    text: ClipTextConfig
    """The text stack."""
    projection: Width = 512
    """Width of the space where images and texts are compared."""
    temperature: Temperature = 0.07
    """Initial temperature of ITC; its inverse is learned, as a logarithm."""

    @property
    def capabilities(self) -> frozenset[str]:
        """It compares images with texts, and neither fuses nor writes."""
        return CAPABILITIES

    @property
    def tokenizer_kind(self) -> Literal["byte-bpe"]:
        return "byte-bpe"

    scored_length: ClassVar[Any] = alias("text.max_positions")
    """As many tokens as it can read, as OpenAI and open_clip evaluate."""
    feature_width: ClassVar[Any] = alias("projection")

    @property
    def towers(self) -> dict[str, dict[str, int | str]]:
        """The shape of each tower; weights of one activation are of no use in the other."""
        return {name: {**shape, "activation": self.activation} for name, shape in super().towers.items()}

    @model_validator(mode="after")
    def _said_once(self) -> ClipConfig:
        if self.vision.activation != "gelu" or self.vision.init_std != 0.02:
            raise ValueError("activation is said once, beside `vision`, and fresh weights are of CLIP's own deviations")
        return self
