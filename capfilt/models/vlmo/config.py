"""VLMo's architecture as a YAML of `models/vlmo/` describes it."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from capfilt.config import Config, added
from capfilt.models.architecture import ModelRole
from capfilt.models.layers.config import MAX_TOKENS, EmbeddingsConfig
from capfilt.models.layers.limits import (
    Depth,
    Deviation,
    Epsilon,
    Heads,
    Hidden,
    Positions,
    Rate,
    Side,
    Temperature,
    Width,
    refuse_too_many,
)
from capfilt.models.layers.towers import OneStackConfig

Output = Literal["mlm", "itm", "itc", "itc_fused"]


class BlocksConfig(Config):
    """The stack of blocks, which texts share, with its patches."""

    image_size: Side
    """Side of the square picture, pixels."""
    patch_size: Side
    """Side of a square patch, pixels; a divisor of `image_size`."""
    width: Width
    """Width of all states; a multiple of `heads`."""
    depth: Depth
    """Blocks."""
    heads: Heads
    """Attention heads of each block."""
    hidden: Hidden
    """Inner width of every expert; 4 x width in the public models."""
    fused: int = Field(ge=0)
    """The last so many blocks have an expert for texts and images together, too; the paper's F: 2 of base, 3 of large.
    0 where texts alone are learned."""
    relative_positions: bool = True
    """Whether a table of relative positions, one for all blocks, is added to attention; or absolute positions to what
    is embedded, as in base-plus."""
    layer_scale: float | None = Field(default=0.1, gt=0)
    """What the factors of each branch begin with; null: there are none, as in base-plus."""
    drop_path: Rate = 0.1
    """Stochastic depth at the last block, grows linearly from 0; as released also `text.dropout`."""
    layer_norm_eps: Epsilon = 1e-6
    """What a LayerNorm of the blocks adds to the variance."""
    init_std: Deviation = 0.02
    """Standard deviation of fresh weights; narrow models learn faster from 1 / sqrt(width)."""

    @model_validator(mode="after")
    def _divisible(self) -> BlocksConfig:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.width % self.heads:
            raise ValueError(f"vision width {self.width} is not a multiple of heads {self.heads}")
        if self.num_tokens > MAX_TOKENS:
            raise ValueError(f"a picture of {self.image_size} px would be {self.num_tokens} tokens, over {MAX_TOKENS}")
        if self.fused >= self.depth:
            raise ValueError(f"fused {self.fused} must be less than depth {self.depth}")
        refuse_too_many("the stack", self.weights)
        return self

    @property
    def side(self) -> int:
        """Patches on a side of the picture."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Patches plus [CLS]."""
        return self.side**2 + 1

    @property
    def weights(self) -> int:
        """About how many numbers it learns; norms and biases are not counted."""
        experts = 2 * (2 * self.depth + self.fused) * self.width * self.hidden
        return self.depth * 4 * self.width**2 + experts + 3 * self.patch_size**2 * self.width


class WordsConfig(EmbeddingsConfig):
    """Embeddings of texts, and the head that guesses words; `max_positions` is 40 beside images, 196 where texts alone
    are learned."""

    longest: Positions = 196
    """How long texts may be by the table of relative positions: as where texts alone were learned."""


class VlmoConfig(OneStackConfig):
    """An architecture of the family: one stack of blocks for texts, images and both (VLMo section 3.2)."""

    family: Literal["vlmo"] = "vlmo"
    vision: BlocksConfig
    """The stack of blocks, which texts share, with its patches."""
    text: WordsConfig
    """Embeddings of texts, and the head that guesses words; `max_positions` is 40 beside images, 196 where texts alone
    are learned."""
    temperature: Temperature = 0.07
    """Initial temperature of both ITCs; learned, and never clamped."""
    outputs: tuple[Output, ...] = ("mlm", "itm", "itc", "itc_fused")
    """What the model has behind the blocks. mlm: guesses hidden words; itm: classifies pairs; itc: compares texts with
    images; itc_fused: compares them behind the fused experts, too, in training alone."""

    images: int = added(1, ge=1, le=8)
    """Pictures beside one text; 2 in NLVR2."""

    @model_validator(mode="after")
    def _fits(self) -> VlmoConfig:
        if "itc_fused" in self.outputs and ("itc" not in self.outputs or not self.vision.fused):
            raise ValueError("outputs has itc_fused, which needs itc and vision.fused > 0")
        if self.text.width != self.vision.width:
            raise ValueError(f"text.width {self.text.width} must be vision.width {self.vision.width}: it is one stack")
        if self.text.tie_lm_head:
            raise ValueError(
                "text.tie_lm_head must be false: the head that guesses words has an output matrix of its own"
            )
        if self.text.max_positions > self.text.longest:
            raise ValueError(f"text.max_positions {self.text.max_positions} is more than longest {self.text.longest}")
        return self

    @property
    def capabilities(self) -> frozenset[str]:
        """What a model can do; it encodes images in any case."""
        given = {"itc": "encode_text", "itm": "fuse", "mlm": "unmask"}
        return frozenset({"encode_image"} | {given[output] for output in self.outputs if output in given})

    @property
    def feature_width(self) -> int:
        return self.vision.width if "itc" in self.outputs else 0

    def for_role(self, role: ModelRole) -> Self:
        """The same without the head that guesses words; it cannot be the captioner."""
        kept = tuple(output for output in self.outputs if output != "mlm")
        return self.model_copy(update={"outputs": kept}) if role == "filter" else self

    def vocabulary_setting(self, entries: int) -> str:
        return f"text.vocab_size={entries}"
