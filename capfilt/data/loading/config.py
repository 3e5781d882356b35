"""The configs of a training's data. They import no torch, so that a recipe is checked and a run reported without it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from capfilt.config import Config, added
from capfilt.data.images.augment import AugmentConfig, check_randaugment

Captions = Literal["all", "one"]
"""Whether each text of an image is a row, or each image."""

RowKind = Literal["captions", "hypotheses", "questions", "statements", "rounds", "phrases"]
"""What of a sample a row is: a text of the image, one of the texts about it that a downstream task answers, or a round
of its dialog (docs/tasks.md)."""


class Source(Config):
    """Some of the shards that a training mixes."""

    shards: str | tuple[str, ...]
    """What `shards.expand` takes: a folder, a glob, braces, an fsspec URL."""
    repeat: float = Field(default=1, gt=0)
    """How often an epoch walks them: a small clean set may count more than once, and of a large one an epoch may take a
    fifth, the next epoch the next fifth (0.2, as BLIP takes LAION)."""


class RegionConfig(Config):
    """Steps on regions, parts of pictures with texts of their own (X-VLM section 3.2); figures are over all ranks."""

    share: float = Field(default=0.5, gt=0, le=1)
    """How many of the steps on pairs a step on regions comes before."""
    images: int = Field(default=384, ge=1)
    """Pictures of such a step; X-VLM: 48 of each of 8 processes."""
    texts: int = Field(default=1024, ge=2)
    """Texts of such a step, drawn from those of its pictures, or some of them twice; X-VLM: 128 of each process."""
    per_image: int = Field(default=5, ge=2)
    """Texts of a picture at most, one of the whole picture among them."""
    visible: float = Field(default=0.5, ge=0, lt=1)
    """A region counts if more than this share of it lies in the crop, which holds one region as a whole."""
    careful_flip: bool = False
    """Whether pictures are left as they are if a text of theirs says left or right."""
    randaugment: tuple[int, int] | None = added(None)
    """How many operations are drawn for such a picture of the five that change colours alone, so that boxes stay right,
    and their magnitude from 0 to 10. X-VLM: 2 and 7."""

    @field_validator("randaugment")
    @classmethod
    def _sensible(cls, drawn: tuple[int, int] | None) -> tuple[int, int] | None:
        check_randaugment(drawn)
        return drawn


class LoaderConfig(Config):
    """How pairs become batches."""

    batch_size: int = Field(default=64, ge=1)
    """Pairs a step over all ranks."""
    max_length: int = Field(default=30, ge=4)
    """Tokens of a text, with [CLS] and [SEP]; BLIP pretrains with 30."""
    shuffle: int = Field(default=4096, ge=1)
    """Rows held back to draw from, over all ranks; the larger, the better mixed. Encoded images, not pixels."""
    lanes: int = Field(default=16, ge=1)
    """Places of the data that are read side by side, of which ranks take equal parts: as many as ranks, or a multiple.
    Lowered to a divisor of the batch size."""
    captions: Captions = "all"
    """Whether each text of an image is a row, or each image, with one of its texts drawn in every epoch."""
    weights: dict[str, float] = {}
    """For captions "one": how likely a text is drawn by its source ("web", "synthetic", "human"); 1 where not given."""
    decoders: int = Field(default=0, ge=0)
    """Threads of each rank that decode pictures; 0 = as many as it computes with."""
    augment: AugmentConfig = AugmentConfig()
    """What happens to a picture at random; by default nothing."""
    prompt: str = ""
    """What each text begins with; the LM loss leaves it out. Captioning fine-tuning: "a picture of "."""
    careful_flip: bool = added(False)
    """Questions, statements, hypotheses: whether a picture is left as it is, where `augment` mirrors, if the text or an
    answer says left or right (X-VLM's VQA)."""
    swap: bool = added(False)
    """Statements: whether the two pictures change places every other time, drawn anew in each epoch, and left and right
    in the text with them (BLIP's NLVR2)."""
    candidates: int = added(10, ge=2)
    """Dialogs: candidate answers of a round, the right one and others drawn anew in each epoch."""

    @field_validator("weights")
    @classmethod
    def _positive(cls, weights: dict[str, float]) -> dict[str, float]:
        if wrong := [source for source, weight in weights.items() if not weight > 0]:
            raise ValueError(f"the weight of {wrong[0]!r} is not above 0; leave such texts out when selecting")
        return weights
