"""ViLT's architecture as a YAML of `models/vilt/` describes it."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from capfilt.config import added
from capfilt.data.images.preprocess import Preprocess
from capfilt.models.architecture import ModelRole, alias
from capfilt.models.layers.config import EmbeddingsConfig, VisionConfig
from capfilt.models.layers.limits import Rate
from capfilt.models.layers.towers import OneStackConfig

Head = Literal["mlm", "itm", "rank", "vqa", "nlvr2", "tokens"]
MATCHING: frozenset[Head] = frozenset({"itm", "rank"})
"""The heads that say whether a text is of an image."""


class BlocksConfig(VisionConfig):
    """The blocks, which are a ViT's, with its patches and positions."""

    grid: int = Field(ge=1, le=256)
    """Patches on a side of the table of positions, from which each picture's are interpolated; 12 in the public models,
    whatever the picture size."""
    dropout: Rate = 0.1
    """Dropout of embedded patches and of the blocks' outputs in training; there is none in attention."""

    @property
    def num_tokens(self) -> int:
        """Places of the table of positions, [CLS] included."""
        return self.grid**2 + 1


class ViltConfig(OneStackConfig):
    """An architecture of the family: one stack of blocks over [text; I_CLS; patches] (ViLT section 3)."""

    family: Literal["vilt"] = "vilt"
    vision: BlocksConfig
    """`image_size` is the shortest side of a picture, which keeps its shape."""
    text: EmbeddingsConfig
    """Embeddings of texts, and the head that guesses words."""
    heads: tuple[Head, ...] = ("mlm", "itm")
    """What the model has beside the blocks. mlm: guesses hidden words; itm: classifies pairs, of pretraining; rank: one
    number a pair, of ViLT's fine-tuning for retrieval; vqa, nlvr2, tokens: the heads of these tasks."""
    images: int = Field(default=1, ge=1, le=8)
    """Pictures beside one text; 2 in NLVR2."""
    labels: int = Field(default=0, ge=0, le=10**6)
    """Classes of the head vqa (3129 answers in VQAv2), nlvr2 (2) or tokens."""
    label_names: tuple[str, ...] = added(())
    """What these classes are, where a checkpoint says it: answers, or false and true."""

    @model_validator(mode="after")
    def _fits(self) -> ViltConfig:
        if self.text.width != self.vision.width:
            raise ValueError(f"text.width {self.text.width} must be vision.width {self.vision.width}: it is one stack")
        if len(classifiers := [head for head in self.heads if head in ("vqa", "nlvr2", "tokens")]) > 1:
            raise ValueError(f"heads has {' and '.join(classifiers)}; a model has one classifier at most")
        if bool(classifiers) != bool(self.labels):
            raise ValueError(f"labels is {self.labels} with heads {', '.join(self.heads)}; a classifier has labels")
        return self

    @property
    def capabilities(self) -> frozenset[str]:
        """It reads a text beside an image and never alone, so it gives itm and no cosine."""
        fuses = {"fuse"} if MATCHING & set(self.heads) else set()
        unmasks = {"unmask"} if "mlm" in self.heads else set()
        return frozenset({"encode_image"} | fuses | unmasks | ({"classify"} if self.label_names else set()))

    @property
    def known_answers(self) -> tuple[str, ...] | None:
        return self.label_names or None

    @property
    def pictures_of_text(self) -> int:
        return self.images if "nlvr2" in self.heads else 1

    @property
    def pooled(self) -> bool:
        """Whether a model has the pooler; a classifier of tokens has none."""
        return self.heads != ("tokens",)

    patch_size: ClassVar[Any] = alias("vision.patch_size")

    def pictures(self, usual: Preprocess) -> Preprocess:
        """The family's way, with sides that patches divide."""
        return usual.model_copy(update={"multiple": self.patch_size})

    def for_role(self, role: ModelRole) -> Self:
        """The same with the heads alone that a filter needs; it cannot be the captioner."""
        return self.changed_heads(tuple(head for head in self.heads if head in MATCHING)) if role == "filter" else self

    def changed(self, **changes: object) -> Self:
        """As of any architecture; `heads` are those of outputs, not of attention."""
        heads = changes.pop("heads", self.heads)
        return super().changed(**changes).model_copy(update={"heads": heads})

    def changed_heads(self, heads: tuple[Head, ...]) -> Self:
        """The same with other heads, none of them a classifier."""
        return self.model_copy(update={"heads": heads, "labels": 0, "label_names": ()})

    def vocabulary_setting(self, entries: int) -> str:
        return f"text.vocab_size={entries}"
