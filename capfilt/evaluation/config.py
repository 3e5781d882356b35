"""How models are evaluated: a config, checked without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from capfilt.config import Config, added
from capfilt.inference.config import DecodeConfig, Precision


class EvaluateConfig(Config):
    """How a model is examined."""

    rerank: int = Field(default=0, ge=0)
    """Retrieval: re-score so many ITC candidates with ITM (BLIP: 256 on COCO); 0 = cosines alone."""
    itm_pairs: int = added(1_000_000, ge=0)
    """Retrieval of a filter without cosines, which reads every text beside every image: the most pairs that are read.
    Of a larger set it is not measured."""
    decode: DecodeConfig = DecodeConfig(method="greedy")
    """How captions are written that are compared with the human ones."""
    batch_size: int = Field(default=64, ge=1)
    """Images at a time."""
    score: Literal["itm", "itc"] = "itm"
    """The filter's score by which web texts of known truth are told apart."""
    threshold: float = 0.5
    """From which score on such a text counts as kept."""
    precision: Precision = added("auto")
    """As of `annotate`: bf16 where all workers have GPUs that multiply it in hardware, fp32 on CPUs."""


EXECUTION_FIELDS = {"batch_size": True, "precision": True}
"""What EvaluateConfig says of how figures are computed, and not of which: no part of plan and fingerprint."""
