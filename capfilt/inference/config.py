"""How texts are written and scored, and in which number format: configs, checked without torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from capfilt.config import Config, added

Format = Literal["fp32", "bf16"]
Precision = Literal["auto", "fp32", "bf16"]
DeviceKind = Literal["cpu", "cuda"]


class DecodeConfig(Config):
    """How a captioner writes. CapFilt: nucleus sampling with p = 0.9 (BLIP section 4.2)."""

    method: Literal["nucleus", "greedy", "beam"] = "nucleus"
    """Nucleus draws, and writes other texts for other seeds; greedy and beam search give each image its one answer.
    BLIP's figures for captioning are of beam search (section 5.2)."""
    top_p: float = Field(default=0.9, gt=0, le=1)
    """Nucleus: draw from the smallest set of tokens whose probabilities reach this."""
    top_k: int = Field(default=0, ge=0)
    """Nucleus: at most so many tokens; 0 = no limit. (The public BLIP script has 50 here without saying so.)"""
    temperature: float = Field(default=1.0, gt=0)
    """Nucleus: logits are divided by it before the nucleus is taken; below 1 the likely tokens gain."""
    beams: int = Field(default=3, ge=1)
    """Beam search: how many texts of an image grow at a time; at most so many `captions` can be had."""
    length_penalty: float = 1.0
    """Beam search: a text's log-probability is divided by its length to this power; above 0, longer texts gain."""
    accounting: Literal["new_tokens", "original"] = added("new_tokens")
    """Beam search: what is a text's length. new_tokens: what is written, as transformers counts today; original: the
    prompt too, as the transformers of BLIP's code (4.15) counted, which also ended a search by another rule. BLIP's
    figures for captioning come from the latter, whose texts are often shorter; docs/parity.md."""
    repetition_penalty: float = Field(default=1.0, ge=1)
    """Divides the positive logits of tokens already there (the prompt's too), multiplies the negative ones; 1 = none.
    (The public BLIP script has 1.1 here when it draws.)"""
    min_length: int = Field(default=5, ge=1)
    """Tokens of prompt and text before the text may end."""
    max_length: int = Field(default=30, ge=3)
    """Tokens of prompt and text at most, with [DEC]."""
    prompt: str = ""
    """What the text begins with; not part of what is returned. Public captioners were fine-tuned with "a picture of
    "."""

    @model_validator(mode="after")
    def _lengths(self) -> DecodeConfig:
        if self.min_length >= self.max_length:
            raise ValueError(f"min_length {self.min_length} is not below max_length {self.max_length}")
        return self


class AnnotateConfig(Config):
    """How texts are written and scored. CapFilt: one nucleus sample per image (BLIP section 4.1)."""

    folder: ClassVar[str] = "annotate"

    captions: int = Field(default=1, ge=1, le=1000)
    """Synthetic texts per image; BLIP-2 takes 10."""
    decode: DecodeConfig = DecodeConfig()
    """How the captioner writes."""
    batch_size: int = Field(default=64, ge=1)
    """Images at a time. A run may go on with another number; docs/promises.md says what that changes."""
    max_length: int = Field(default=35, ge=4)
    """Tokens of a text that is scored; BLIP scores with 35."""
    precision: Precision = "auto"
    """auto: bf16 where all workers have GPUs that multiply it in hardware, fp32 on CPUs; chosen once for a run."""

    @model_validator(mode="after")
    def _enough(self) -> AnnotateConfig:
        if self.decode.method == "beam" and self.captions > self.decode.beams:
            raise ValueError(
                f"captions {self.captions} of {self.decode.beams} beams: decode.beams must be at least as many"
            )
        return self


EXECUTION_FIELDS = {"batch_size": True, "precision": True}
"""What AnnotateConfig says of how texts are computed and not of which: no part of plan and fingerprint. In their place
stands the format that was chosen, in `AnnotateJob.compute`. As what pydantic leaves out."""
