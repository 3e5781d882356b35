"""BLIP's architecture as a YAML of `models/blip/` describes it."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import model_validator

from capfilt.config import added
from capfilt.models.architecture import alias
from capfilt.models.layers.config import TextConfig
from capfilt.models.layers.towers import ComparingConfig


class BlipConfig(ComparingConfig):
    """An architecture of the family: what a YAML of `models/blip/` says."""

    rank_smoothing = 0.1  # as BLIP's code ranks, by the loss that it trains with

    family: Literal["blip"] = "blip"
    text: TextConfig
    itm_token: Literal["enc", "cls"] = "enc"
    """The first token of a text that ITM reads. Training puts [ENC] there; BLIP's own ITM script and transformers leave
    [CLS], which a checkpoint has never seen in that place and scores differently."""
    answers: bool = False
    """A question-answering model: its decoder attends to the question as the encoder fused it with the image, not to
    the image, and it has no heads that compare."""

    answer_list: tuple[str, ...] = added(())
    """The answers that a question-answering model chooses among; none: it writes."""

    @property
    def capabilities(self) -> frozenset[str]:
        if self.answers:  # neither a captioner nor a filter, though it has an encoder and a decoder
            return frozenset({"encode_image", "answer"})
        encoder = {"encode_text", "fuse"} if "encoder" in self.text.roles else set()
        decoder = {"decode"} if "decoder" in self.text.roles else set()
        return frozenset({"encode_image"} | encoder | decoder)

    first_token: ClassVar[Any] = alias("text.dec")
    """[DEC], which a decoded text begins with."""

    @property
    def known_answers(self) -> tuple[str, ...] | None:
        return self.answer_list if self.answers else None

    def with_answers(self, answers: tuple[str, ...]) -> BlipConfig:
        return self.model_copy(update={"answer_list": answers})

    @property
    def compares(self) -> bool:
        """Whether a model has the heads that compare images and texts, and the temperature of ITC."""
        return "encoder" in self.text.roles and not self.answers

    @model_validator(mode="after")
    def _askable(self) -> BlipConfig:
        if self.answers and self.vision.width != self.text.width:
            raise ValueError(
                f"a model that answers attends to images and to questions through one width, not {self.vision.width} "
                f"and {self.text.width}"
            )
        return self
