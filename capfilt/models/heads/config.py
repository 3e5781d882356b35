"""The architectures of models for downstream tasks, as recipes describe them: a base of any family, and a head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator, model_validator

from capfilt.config import OpenSection
from capfilt.models.architecture import ArchitectureConfig

if TYPE_CHECKING:
    from capfilt.data.images.preprocess import Preprocess
    from capfilt.data.text.language_tokenizer import TokenizerKind

HeadKind = Literal["relu", "norm"]


def _bases() -> Mapping[str, type[ArchitectureConfig]]:
    from capfilt.models.registry import FAMILIES

    return {name: family.config for name, family in FAMILIES.items() if not issubclass(family.config, HeadConfig)}


_SECTION = OpenSection("family", _bases, "blip", base=ArchitectureConfig)


def _section(value: Any) -> Any:
    return _SECTION({"extends": value} if isinstance(value, str) else value)


Base = Annotated[SerializeAsAny[ArchitectureConfig], BeforeValidator(_section)]
"""The architecture under a head: a preset of `models/`, a YAML, or the keys of one."""


class HeadConfig(ArchitectureConfig):
    """An architecture that is a head on another, of which it keeps what a filter has."""

    image_size_key: ClassVar[str] = "base.vision.image_size"

    base: Base
    """The model under the head, of any family that fuses texts with images: a preset, a YAML, or its keys."""

    @field_validator("base")
    @classmethod
    def _without_other_heads(cls, base: ArchitectureConfig) -> ArchitectureConfig:
        return base.for_role("filter")

    @property
    def image_size(self) -> int:
        """Side of the square picture, pixels."""
        return self.base.image_size

    @property
    def vocabulary_size(self) -> int:
        """How many entries a tokenizer may have, special tokens included."""
        return self.base.vocabulary_size

    @property
    def max_positions(self) -> int:
        """Tokens of a text at most."""
        return self.base.max_positions

    @property
    def num_weights(self) -> int:
        """About how many numbers a model learns; norms and biases are not counted."""
        return self.base.num_weights

    @property
    def num_layers(self) -> int:
        """Layers of all towers, of which a file of weights has a tensor each at least."""
        return self.base.num_layers

    @property
    def vision_depth(self) -> int:
        """Blocks of the vision tower whose activations can be recomputed."""
        return self.base.vision_depth

    @property
    def towers(self) -> dict[str, dict[str, int | str]]:
        """The shape of each tower of the base."""
        return self.base.towers

    @property
    def tokenizer_kind(self) -> TokenizerKind:
        """How its texts are cut into tokens."""
        return self.base.task_tokenizer_kind

    @property
    def starts_from(self) -> ArchitectureConfig:
        """A model of this architecture may start from one that is the base alone."""
        return self.base

    def pictures(self, usual: Preprocess) -> Preprocess:
        """As the base wants them."""
        from capfilt.models.registry import preprocess_of

        return preprocess_of(self.base)

    def changed(self, **changes: object) -> Self:
        """The same with some fields set otherwise, its own or those of its base."""
        mine = {name: value for name, value in changes.items() if name in type(self).model_fields}
        theirs = {name: value for name, value in changes.items() if name not in mine}
        return self.model_copy(update={**mine, "base": self.base.changed(**theirs)} if theirs else mine)

    def vocabulary_setting(self, entries: int) -> str:
        """The assignment that makes room for a tokenizer of `entries`."""
        setting = self.base.vocabulary_setting(entries)
        return f"base.{setting}" if setting else ""


class ClassifierConfig(HeadConfig):
    """Classes of a text beside one picture or two, from what the base fuses: entailment, VQA over a list of answers,
    NLVR2."""

    family: Literal["classifier"] = "classifier"
    labels: tuple[str, ...] = Field(min_length=2, max_length=10**6)
    """The classes by their names, in the order of the head's outputs."""
    head: HeadKind | None = None
    """relu: a layer as wide as what is fused, and the classes (ALBEF, BLIP); norm: a layer twice as wide, normalised,
    with GELU (ViLT, VLMo, X-VLM); null: as the family of the base has it."""

    @model_validator(mode="after")
    def _distinct(self) -> ClassifierConfig:
        if twice := [label for label in self.labels if self.labels.count(label) > 1][:1]:
            raise ValueError(f"labels has {twice[0]!r} twice")
        return self

    @property
    def capabilities(self) -> frozenset[str]:
        """It classifies a text beside an image, and plays neither role."""
        return frozenset({"encode_image", "classify"})

    @property
    def head_kind(self) -> HeadKind:
        """Which of the heads it is."""
        return self.head or ("relu" if self.base.family in ("blip", "albef") else "norm")
