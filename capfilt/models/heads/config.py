"""The architectures of models for downstream tasks, as recipes describe them: a base of any family, and a head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator, model_validator

from capfilt.config import OpenSection
from capfilt.models.architecture import ArchitectureConfig, alias
from capfilt.models.layers.config import DecoderConfig
from capfilt.models.layers.limits import Depth
from capfilt.storage.paths import storage_path

if TYPE_CHECKING:
    from capfilt.data.images.preprocess import Preprocess

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

    image_size: ClassVar[Any] = alias("base.image_size")
    vocabulary_size: ClassVar[Any] = alias("base.vocabulary_size")
    max_positions: ClassVar[Any] = alias("base.max_positions")
    num_layers: ClassVar[Any] = alias("base.num_layers")
    vision_depth: ClassVar[Any] = alias("base.vision_depth")
    towers: ClassVar[Any] = alias("base.towers")
    tokenizer_kind: ClassVar[Any] = alias("base.tokenizer_kind")
    starts_from: ClassVar[Any] = alias("base")
    """A model of this architecture may start from one that is the base alone."""

    @field_validator("base")
    @classmethod
    def _without_other_heads(cls, base: ArchitectureConfig) -> ArchitectureConfig:
        return base.for_role("filter")

    @property
    def num_weights(self) -> int:
        return self.base.num_weights

    def pictures(self, usual: Preprocess) -> Preprocess:
        from capfilt.models.registry import preprocess_of

        return preprocess_of(self.base)

    def changed(self, **changes: object) -> Self:
        mine = {name: value for name, value in changes.items() if name in type(self).model_fields}
        theirs = {name: value for name, value in changes.items() if name not in mine}
        return self.model_copy(update={**mine, "base": self.base.changed(**theirs)} if theirs else mine)

    def vocabulary_setting(self, entries: int) -> str:
        setting = self.base.vocabulary_setting(entries)
        return f"base.{setting}" if setting else ""


def _lines(value: Any) -> Any:
    """The lines of a file, where one is named."""
    if not isinstance(value, str):
        return value
    try:
        return [line for line in storage_path(value).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"the file cannot be read ({type(error).__name__}); give a file of one answer a line"
        ) from None


Labels = Annotated[tuple[str, ...], BeforeValidator(_lines), Field(max_length=10**6)]


class ClassifierConfig(HeadConfig):
    """Classes of a text beside one picture or two, from what the base fuses: entailment, VQA over a list of answers,
    NLVR2."""

    family: Literal["classifier"] = "classifier"
    labels: Labels = ()
    """The classes by their names, in the order of the head's outputs: a list, or a file of one a line. None: those that
    a training for VQA counts."""
    images: Literal[1, 2] = 1
    """Pictures beside a text. Two are fused apart, one after the other, and joined (ViLT, VLMo); by layers in pairs, of
    which each attends to one (ALBEF, X-VLM); or in each layer, and merged there (BLIP)."""
    head: HeadKind | None = None
    """relu: a layer as wide as what is fused, and the classes (ALBEF, BLIP); norm: a layer twice as wide, normalised,
    with GELU (ViLT, VLMo, X-VLM); null: as the family of the base has it."""

    pictures_of_text: ClassVar[Any] = alias("images")
    known_answers: ClassVar[Any] = alias("labels")

    @model_validator(mode="before")
    @classmethod
    def _pictures_of_base(cls, tree: Any) -> Any:
        """The embedding of the second picture is the base's, in families that have one."""
        if isinstance(tree, dict) and tree.get("images") == 2:
            base = _section(tree.get("base"))
            if isinstance(base, ArchitectureConfig) and "images" in type(base).model_fields:
                return tree | {"base": base.model_copy(update={"images": 2})}
        return tree

    @model_validator(mode="after")
    def _fits(self) -> ClassifierConfig:
        if len(set(self.labels)) != len(self.labels):
            twice = next(label for number, label in enumerate(self.labels) if label in self.labels[:number])
            raise ValueError(f"labels has {twice!r} twice")
        if len(self.labels) == 1:
            raise ValueError("labels has one class; a classifier has two at least")
        return self

    @property
    def capabilities(self) -> frozenset[str]:
        """It classifies a text beside an image, and plays neither role."""
        return frozenset({"encode_image", "classify"})

    def with_answers(self, answers: tuple[str, ...]) -> ClassifierConfig:
        return self.model_copy(update={"labels": answers})

    @property
    def head_kind(self) -> HeadKind:
        return self.head or ("relu" if self.base.family in ("blip", "albef") else "norm")


class AnswererConfig(HeadConfig):
    """Answers to questions about a picture: a decoder beside what the base fuses of the question and the picture (VQA
    of ALBEF and X-VLM; BLIP's is its own architecture, with `answers`)."""

    ranks_first_twice = True  # as the codes of ALBEF and X-VLM rank: P(first token), and P(all tokens) again

    family: Literal["answerer"] = "answerer"
    depth: Depth | None = None
    """Layers of the decoder, which begin with the last layers of the base; null: as many as fuse."""
    answer_list: Labels = ()
    """The answers that it chooses among: a list, or a file of one a line. None: those that a training counts."""

    known_answers: ClassVar[Any] = alias("answer_list")

    @property
    def capabilities(self) -> frozenset[str]:
        """It answers questions, and plays neither role."""
        return frozenset({"encode_image", "answer"})

    @property
    def decoder(self) -> DecoderConfig:
        """The decoder, shaped as the base's text stack."""
        text = self.base.text  # type: ignore[attr-defined]
        alike = {name: getattr(text, name) for name in DecoderConfig.model_fields if name not in ("depth", "roles")}
        return DecoderConfig(**alike, depth=self.depth or len(self.base.fusion_layers))

    @property
    def num_weights(self) -> int:
        return self.base.num_weights + self.decoder.weights

    def with_answers(self, answers: tuple[str, ...]) -> AnswererConfig:
        return self.model_copy(update={"answer_list": answers})
