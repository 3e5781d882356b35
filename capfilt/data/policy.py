"""The policy: which texts are kept, decided from their scores alone, so that a new threshold needs no model.

CapFilt filters the web text and the synthetic text of an image independently; an image may keep none, one or both
(BLIP section 4.1). BLIP-2 ranks all texts of an image by similarity and keeps the two best (its section 3.4).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from capfilt.config import Config
from capfilt.data.annotations import Annotation
from capfilt.data.sample import is_text
from capfilt.errors import DataError, RecipeError
from capfilt.printable import printable
from capfilt.runs.tally import NO_TEXT

Score = Literal["itm", "itc"]


class RankConfig(Config):
    """What comes after the thresholds: which of an image's texts that passed are kept."""

    combine: Literal["and", "or"] = "and"
    """With `other_threshold`: whether a text must reach both thresholds, or one of them."""
    other_threshold: float | None = None
    """A threshold on the other score too (on itc where `score` is itm)."""
    top_k: int = Field(default=0, ge=0)
    """Of an image's texts, web and synthetic together, the best so many; 0 = all. BLIP-2: 2, and no threshold."""
    rank: Score = "itc"
    """The score by which texts are better than one another."""
    keep: Literal["all", "best-of"] = "all"
    """best-of: one text an image, the best that came with it if one passes, else the best synthetic one that does."""


class PolicyConfig(RankConfig):
    """Which texts are kept."""

    folder: ClassVar[str] = "select"

    score: Score = "itm"
    """itm = P(match); itc = cosine."""
    threshold: float | Literal["calibrated", "keep-rate"] | None = 0.5
    """A number (the paper's is 0.5 on itm); "calibrated": set on human validation pairs; "keep-rate": a share is
    kept; null: none, which is what it is where `top_k` is given and this is not."""
    recall: float = Field(default=0.8, gt=0, lt=1)
    """For "calibrated": the share of human validation pairs that must pass."""
    keep_rate: float = Field(default=0.5, gt=0, lt=1)
    """For "keep-rate": the share of all texts to keep."""
    carry: bool = True
    """Whether a kept sample takes along, byte for byte, what else lay under its key (`KEY.npy`, `KEY.mask.png`)."""

    @model_validator(mode="before")
    @classmethod
    def _ranking_alone(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("top_k") and "threshold" not in given:
            return {**given, "threshold": None}
        return given

    @model_validator(mode="after")
    def _meaningful(self) -> PolicyConfig:
        if self.top_k and self.keep == "best-of":
            raise ValueError(f"top_k {self.top_k} keeps several texts an image and keep best-of one; leave one out")
        if self.threshold is None and self.other_threshold is not None:
            raise ValueError("other_threshold without a threshold; give the one threshold, with `score` naming it")
        return self

    @property
    def needed_scores(self) -> tuple[Score, ...]:
        """The scores without which this policy keeps nothing, or ranks blindly."""
        needed: list[Score] = []
        if self.threshold is not None and (self.other_threshold is None or self.combine == "and"):
            needed.append(self.score)
            if self.other_threshold is not None:
                needed.append(other(self.score))
        if self.threshold is None or self.top_k or self.keep == "best-of":
            needed.append(self.rank)
        return tuple(dict.fromkeys(needed))

    def rule(self, threshold: float | None) -> Rule:
        """This policy with the number that its threshold turned out to be."""
        own = {name: getattr(self, name) for name in RankConfig.model_fields}
        return Rule(score=self.score, threshold=threshold, **own)


class Rule(RankConfig):
    """A policy whose threshold is known: what a worker decides by."""

    score: Score
    threshold: float | None

    def __str__(self) -> str:
        """What a text must reach, in a few words."""
        if self.threshold is None:
            return f"the {self.top_k} best by {self.rank}" if self.top_k else "any score"
        reach = f"{self.score} >= {self.threshold:.4f}"
        if self.other_threshold is not None:
            reach += f" {self.combine} {other(self.score)} >= {self.other_threshold:.4f}"
        return reach


def other(score: Score) -> Score:
    """The other of the two scores."""
    return "itc" if score == "itm" else "itm"


def check_scores(needed: Iterable[str], given: Sequence[str], whose: object) -> None:
    """Refuse a policy or a calibration by scores that a filter does not give. RecipeError."""
    if missing := [score for score in needed if score not in given]:
        raise RecipeError(
            f"{missing[0]} is needed, and {whose} gives {', '.join(given)} alone: set score={given[0]} (and"
            f" rank={given[0]}) with a threshold for it, or take a filter that gives {missing[0]}."
        )


def judge(rows: Sequence[Annotation], rule: Rule) -> list[str]:
    """Why each text of one image is dropped, or "" where it is kept. A score passes when it reaches its threshold."""
    whys = [_alone(row, rule) for row in rows]
    if not rule.top_k and rule.keep == "all":
        return whys
    passed = [i for i, why in enumerate(whys) if not why]
    passed.sort(key=lambda i: _place(rows[i], rule.rank))
    if rule.keep == "best-of":
        passed.sort(key=lambda i: rows[i].source == "synthetic")
    taken: set[str] = set()
    for i in passed:
        if rows[i].text.strip() in taken:
            whys[i] = "same text as a better one"
        elif rule.top_k and len(taken) == rule.top_k:
            whys[i] = f"not among the {rule.top_k} best by {rule.rank}"
        elif rule.keep == "best-of" and taken:
            whys[i] = "another text of the image is better"
        else:
            taken.add(rows[i].text.strip())
    return whys


def best(kept: Iterable[Annotation], rule: Rule) -> Annotation:
    """The best of an image's kept texts, by `rank` where the policy ranks (`top_k`, no threshold), else by `score`."""
    by = rule.rank if rule.top_k or rule.threshold is None else rule.score
    return min(kept, key=lambda row: _place(row, by))


def _place(row: Annotation, score: Score) -> tuple[float, bool, bool, int]:
    """Sorts better texts first; of equals those that came from the web, then people's, then the first written."""
    order = (row.source == "synthetic", row.source != "web", row.candidate)
    return (-_score(row, score), *order)


def _alone(row: Annotation, rule: Rule) -> str:
    """Why a text is dropped whatever the image's other texts are."""
    if row.status == "failed":
        return row.reason
    if not is_text(row.text):
        return NO_TEXT
    if rule.threshold is None:
        return f"no {rule.rank} score" if _missing(row, rule.rank) else ""
    one = _below(row, rule.score, rule.threshold)
    if rule.other_threshold is None:
        return one or (f"no {rule.rank} score" if rule.top_k and _missing(row, rule.rank) else "")
    two = _below(row, other(rule.score), rule.other_threshold)
    if rule.combine == "or":
        return f"{one}, {two}" if one and two else ""
    return one or two


def _below(row: Annotation, score: Score, threshold: float) -> str:
    if _missing(row, score):
        return f"no {score} score"
    return "" if _score(row, score) >= threshold else f"{score} below threshold"


def _missing(row: Annotation, score: Score) -> bool:
    return (row.itm if score == "itm" else row.itc) is None


def _score(row: Annotation, score: Score) -> float:
    value = row.itm if score == "itm" else row.itc
    return -2.0 if value is None else float(value)  # below every cosine


def failure(reason: str) -> str:
    """The class of a failure, as it is counted: its reason without the particulars (a place, a size, a message)."""
    return printable(re.split(r":| \(| at byte", reason, maxsplit=1)[0])


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
