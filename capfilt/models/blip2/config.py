"""BLIP-2's architecture as a YAML of `models/blip2/` describes it: the Q-Former and the language model behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from capfilt.config import Config, added
from capfilt.errors import ModelError
from capfilt.models.architecture import alias
from capfilt.models.layers.config import BertConfig, VisionConfig
from capfilt.models.layers.limits import MAX_DEPTH, MAX_ENTRIES, Depth, Epsilon, Positions, Temperature, Width
from capfilt.models.layers.towers import TowersConfig

if TYPE_CHECKING:
    import torch

Kind = Literal["opt", "t5"]
Format = Literal["fp32", "bf16", "fp16"]

CLASSES: dict[Kind, tuple[str, str]] = {
    "opt": ("OPTConfig", "OPTForCausalLM"),
    "t5": ("T5Config", "T5ForConditionalGeneration"),
}
"""The classes of transformers."""


class QFormerConfig(BertConfig):
    """BERT with queries (BLIP-2 section 3.1: BERT-base, 32 queries). Of `vocab_size` entries the last is [DEC], 30522
    after BERT's vocabulary. There is no [ENC]: matching reads a text behind [CLS]. With no role at all, as in stage 2,
    there is no part for texts; the output matrix is always the word embeddings."""

    tie_lm_head: Literal[True] = True
    queries: Positions = 32
    """Learned queries that read the image; as many vectors of it reach the language model."""
    cross_every: Depth = 2
    """Layers 0, `cross_every`, 2 `cross_every`, ... attend to the image."""

    @property
    def dec(self) -> int:
        """Id of [DEC], which stands in place of [CLS] when the stack writes; also how many words there are beside."""
        return self.vocab_size - 1


class LanguageConfig(Config):
    """A language model of transformers. BLIP-2 section 3.3: OPT, whose decoder goes on after the image, or Flan-T5."""

    kind: Kind
    """OPT, whose decoder goes on after the image, or T5, whose encoder reads it."""
    settings: dict[str, bool | int | float | str | None] = Field(min_length=1)
    """The keys of its `config.json` that are not the defaults of transformers."""
    tied: bool = True
    """Whether its output matrix is its word embeddings; Flan-T5's is not."""
    image_token: int | None = None
    """The id that stands for an image in the texts of transformers' BLIP-2; none of ours. Default: the vocabulary's
    last entry, which OPT and T5 have for padding alone."""

    @field_validator("settings")
    @classmethod
    def _bounded(cls, settings: dict[str, Any]) -> dict[str, Any]:
        for name, value in settings.items():
            most = MAX_DEPTH if "layers" in name else MAX_ENTRIES
            if isinstance(value, int) and value > most:
                raise ValueError(f"{name} is too large; allowed are {most} at most")
        return settings

    @property
    def width(self) -> int:
        """Width of the vectors that it reads."""
        return int(self.settings["hidden_size" if self.kind == "opt" else "d_model"] or 0)

    @property
    def for_images(self) -> int:
        """The id that stands for an image in the texts of transformers' BLIP-2."""
        return self.described().vocab_size - 1 if self.image_token is None else self.image_token

    def described(self) -> Any:
        """Its configuration as an object of transformers.

        Raises:
            ModelError: settings that transformers does not take.
        """
        import transformers
        from huggingface_hub.errors import StrictDataclassError

        try:
            return getattr(transformers, CLASSES[self.kind][0])(**self.settings)
        except (TypeError, ValueError, StrictDataclassError) as error:
            why = " ".join(str(error).split())
            raise ModelError(f"language.settings describe no {self.kind.upper()} of transformers: {why}") from None


class Blip2Config(TowersConfig):
    """An architecture of the family: what a YAML of `models/blip2/` says."""

    frozen_vision = True

    family: Literal["blip2"] = "blip2"
    vision: VisionConfig
    """Frozen. Its own final norm is left out: a trained one takes its place (`vision_norm`)."""
    vision_norm_eps: Epsilon | None = added(None)
    """Epsilon of that norm: null is the tower's, as in transformers; in LAVIS it is 1e-5."""
    text: QFormerConfig
    """The Q-Former."""
    projection: Width = 256
    """Width of the space where images and texts are compared."""
    temperature: Temperature = 0.07
    """Initial temperature of ITC; learned, and never clamped."""
    language: LanguageConfig | None = None
    """Stage 2: what writes."""
    frozen: Format = "bf16"
    """The number format in which the frozen towers are held and compute."""

    @property
    def language_kind(self) -> Kind | None:
        """In whose tokens its texts are: the language model's, or None for WordPiece."""
        return self.language.kind if self.language is not None else None

    @property
    def vocabulary_size(self) -> int:
        """How many entries a tokenizer may have: the language model's own, or those of the Q-Former and [ENC]."""
        if self.language is not None:
            return int(self.language.described().vocab_size)
        return self.text.vocab_size + 1

    @property
    def capabilities(self) -> frozenset[str]:
        """What a model can do: in stage 2 texts alone, in stage 1 what the parts of its Q-Former can do."""
        if self.language is not None:
            return frozenset({"encode_image", "decode"})
        encoder = {"encode_text", "fuse"} if "encoder" in self.text.roles else set()
        decoder = {"decode"} if "decoder" in self.text.roles else set()
        return frozenset({"encode_image"} | encoder | decoder)

    @property
    def first_token(self) -> int | None:
        """[DEC] of the Q-Former, which a decoded text begins with; a language model's tokenizer has its own."""
        return self.text.dec if self.language is None else None

    feature_width: ClassVar[Any] = alias("projection")

    @property
    def compares(self) -> bool:
        """Whether a model has the heads that compare images and texts, and the temperature of ITC."""
        return "encoder" in self.text.roles

    def computing_in(self, dtype: torch.dtype | None) -> Self:
        """The same, and frozen towers that are kept in fp32 held in bf16 for a model that computes in it: they would
        go through it slowly, or be cast anew for every token that is written."""
        import torch

        held = self.frozen == "fp32" and dtype == torch.bfloat16
        return self.model_copy(update={"frozen": "bf16"}) if held else self

    def check_language(self, source: str) -> None:
        from capfilt.models.blip2.language_model import check_language

        if self.language is not None:
            check_language(source, self.language)

    @model_validator(mode="after")
    def _one_writer(self) -> Blip2Config:
        if self.language is not None and self.text.roles:
            raise ValueError("with a language model the Q-Former has no part for texts: text.roles must be []")
        if self.language is None and not self.text.roles:
            raise ValueError("text.roles is empty, and there is no language model: it could do nothing")
        if self.frozen == "fp16" and self.language_kind == "t5":
            raise ValueError("frozen is fp16, in which T5 overflows: set it to bf16")
        if self.vision.final_norm:
            raise ValueError("vision.final_norm must be false: the norm behind the frozen tower is the Q-Former's")
        return self
