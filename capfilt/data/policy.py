"""The policy: which texts are kept, decided from their scores alone, so that a new threshold needs no model.

CapFilt filters the web text and the synthetic text of an image independently; an image may keep none, one or both
(BLIP section 4.1).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

import numpy as np
from pydantic import Field

from capfilt.config import Config
from capfilt.data.annotations import Annotation
from capfilt.errors import DataError


class PolicyConfig(Config):
    """How texts are judged."""

    score: Literal["itm", "itc"] = "itm"
    """itm = P(match); itc = cosine."""
    threshold: float | Literal["calibrated", "keep-rate"] = 0.5
    """A number (the paper's is 0.5 on itm); "calibrated": set on human validation pairs; "keep-rate": a share is
    kept."""
    recall: float = Field(default=0.8, gt=0, lt=1)
    """For "calibrated": the share of human validation pairs that must pass."""
    keep_rate: float = Field(default=0.5, gt=0, lt=1)
    """For "keep-rate": the share of all texts to keep."""


def judge(row: Annotation, score: str, threshold: float) -> str:
    """Why a text is dropped, or "" if it is kept. A text is kept when its score reaches the threshold."""
    if row.status == "failed":
        return row.reason
    if not row.text.strip():
        return "empty text"
    value = row.itm if score == "itm" else row.itc
    if value is None:
        return f"no {score} score"
    return "" if float(value) >= threshold else f"{score} below threshold"


def failure(reason: str) -> str:
    """The class of a failure, as it is counted: its reason without the particulars (a place, a size, a message)."""
    return re.split(r":| \(| at byte", reason, maxsplit=1)[0]


def keep_rate_threshold(scores: Iterable[np.ndarray], keep_rate: float) -> float:
    """The threshold that keeps this share of all scores, from shard after shard in bounded memory.

    Scores are counted in 2^20 bins over [-1, 1]: exact to two millionths.
    """
    bins = 1 << 20
    counts = np.zeros(bins, np.int64)
    for part in scores:
        counts += np.bincount(np.clip(((part + 1) / 2 * bins).astype(np.int64), 0, bins - 1), minlength=bins)
    if not counts.any():
        raise DataError("no text has a score, so no share of them can be kept; annotate first")
    from_top = np.cumsum(counts[::-1])
    wanted = int(np.searchsorted(from_top, max(1, round(keep_rate * counts.sum()))))
    return float((bins - 1 - wanted) / bins * 2 - 1)
