"""The policy: which texts are kept, decided from their scores alone, so that a new threshold needs no model.

CapFilt filters the web text and the synthetic text of an image independently; an image may keep none, one or both
(BLIP section 4.1). BLIP-2 ranks all texts of an image by similarity and keeps the two best (its section 3.4).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from capfilt.config import Config, Layer
from capfilt.data.annotations import Annotation
from capfilt.data.sample import is_text
from capfilt.errors import DataError, RecipeError
from capfilt.printable import printable
from capfilt.runs.tally import NO_TEXT, no_text

Score = Literal["itm", "itc"]

LOWEST: dict[Score, float] = {"itm": 0.0, "itc": -1.0}
"""The least value that a score can have; the greatest is 1 for both."""

_BEST_OF = "best-of"
"""What `web-first` was called; plans and fingerprints say so to this day, so that older runs go on."""


class RankConfig(Config):
    """Which texts reach their thresholds, and which of an image's texts that do are kept."""

    combine: Literal["and", "or"] = "and"
    """With `other_threshold`: whether a text must reach both thresholds, or one of them."""
    other_threshold: float | None = None
    """A threshold on the other score too (on itc where `score` is itm)."""
    top_k: int = Field(default=0, ge=0)
    """How many of an image's texts, web and synthetic together, are kept, the best ones; 0 = all. BLIP-2: 2, and no
    threshold."""
    rank: Score = "itc"
    """The score by which an image's texts are ranked."""
    keep: Literal["all", "web-first", "best"] = "all"
    """Of an image's texts that pass: all; web-first: the best that came with it, else the best synthetic one; best: the
    best of all, web and synthetic together."""

    @field_validator("keep", mode="before")
    @classmethod
    def _renamed(cls, value: Any) -> Any:
        return "web-first" if value == _BEST_OF else value

    def record(self) -> dict[str, Any]:
        """The fields as plans and fingerprints have them, equal for equal policies of older runs."""
        fields = self.model_dump(mode="json")
        return {**fields, "keep": _BEST_OF} if self.keep == "web-first" else fields


class PolicyConfig(RankConfig):
    """How texts are chosen: the settings of `select`."""

    folder: ClassVar[str] = "select"

    score: Score = "itm"
    """itm = P(match); itc = cosine."""
    threshold: float | Literal["calibrated", "keep-rate"] | None = 0.5
    """A number (the paper's is 0.5 on itm); "calibrated": set on human validation pairs; "keep-rate": a share is
    kept; null: none, the default where `top_k` is given."""
    recall: float = Field(default=0.8, gt=0, lt=1)
    """For "calibrated": the share of the human validation pairs that must pass."""
    keep_rate: float = Field(default=0.5, gt=0, lt=1)
    """For "keep-rate": the share of all texts to keep."""
    carry: bool = True
    """Whether a kept sample keeps, byte for byte, the other members under its key (`KEY.npy`, `KEY.mask.png`)."""

    @model_validator(mode="before")
    @classmethod
    def _no_threshold_with_top_k(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("top_k") and "threshold" not in values:
            return {**values, "threshold": None}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> PolicyConfig:
        if self.top_k and self.keep != "all":
            raise ValueError(
                f"top_k {self.top_k} and keep {self.keep} both say how many texts of an image are kept; leave one out"
            )
        if self.threshold is None and self.other_threshold is not None:
            raise ValueError("other_threshold without a threshold; give the one threshold, with `score` naming it")
        return self

    @property
    def needed_scores(self) -> tuple[Score, ...]:
        """The scores without which this policy keeps nothing, or cannot rank."""
        needed: list[Score] = []
        if self.threshold is not None and (self.other_threshold is None or self.combine == "and"):
            needed.append(self.score)
            if self.other_threshold is not None:
                needed.append(other_score(self.score))
        if self.ranks:
            needed.append(self.rank)
        return tuple(dict.fromkeys(needed))

    @property
    def ranks(self) -> bool:
        """Whether the texts of an image are ranked by `rank`."""
        return self.threshold is None or self.top_k > 0 or self.keep != "all"

    def check_input(self, layers: Sequence[Layer]) -> None:
        """Refuse a threshold that no score can reach or miss, and keys without effect. RecipeError.

        A key is refused only where it has no effect beside what is given with it and below it: a threshold given with
        --set may leave the `recall` of a preset without one.
        """
        for key, score in (("threshold", self.score), ("other_threshold", other_score(self.score))):
            value, givers = getattr(self, key), [layer for layer in layers if key in layer.given]
            if isinstance(value, float) and givers and not LOWEST[score] <= value <= 1:
                raise givers[-1].error(
                    key, f"it is compared with {score}, which lies in [{LOWEST[score]:g}, 1]; give a number there"
                )
        fields = type(self).model_fields
        for layer in layers:
            if {name for name, field in fields.items() if field.exclude_if is None} <= layer.given.keys():
                continue  # the record of a run, which has every key
            for key, condition in _without_effect(layer.merged):
                if key in layer.given and (not layer.where or layer.given[key] != fields[key].default):
                    raise layer.error(key, f"it has no effect without {condition}; give that too, or leave {key} out")
        if [layer.given["keep"] for layer in layers if "keep" in layer.given][-1:] == [_BEST_OF]:
            logging.getLogger(__name__).warning(
                "note: keep=best-of is called web-first now and does the same; keep=best keeps the best text of all"
            )

    def rule(self, threshold: float | None) -> Rule:
        """This policy with the number that its threshold came to; None for none."""
        ranking = {name: getattr(self, name) for name in RankConfig.model_fields}
        return Rule(score=self.score, threshold=threshold, **ranking)


class Rule(RankConfig):
    """A policy whose threshold is a number: what a worker applies."""

    score: Score
    threshold: float | None

    def __str__(self) -> str:
        """What a text must reach, in a few words."""
        if self.threshold is None:
            return f"the {self.top_k} best by {self.rank}" if self.top_k else "any score"
        condition = f"{self.score} >= {self.threshold:.4f}"
        if self.other_threshold is not None:
            condition += f" {self.combine} {other_score(self.score)} >= {self.other_threshold:.4f}"
        return condition


def _without_effect(tree: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The keys of a policy that decide nothing beside the others, each with what it lacks."""
    threshold = tree.get("threshold", None if tree.get("top_k") else 0.5)
    if threshold != "keep-rate":
        yield "keep_rate", "threshold=keep-rate"
    if threshold != "calibrated":
        yield "recall", "threshold=calibrated"
    if tree.get("other_threshold") is None:
        yield "combine", "other_threshold"
    if threshold is not None and not tree.get("top_k") and tree.get("keep", "all") == "all":
        yield "rank", "top_k, keep=web-first or keep=best"


def other_score(score: Score) -> Score:
    """The other of the two scores."""
    return "itc" if score == "itm" else "itm"


def check_scores(needed: Iterable[str], given: Sequence[str], whose: object) -> None:
    """Refuse a policy or a calibration by scores that a filter does not give. RecipeError."""
    if missing := [score for score in needed if score not in given]:
        raise RecipeError(
            f"{missing[0]} is needed, and {whose} gives {', '.join(given)} alone: set score={given[0]} (and"
            f" rank={given[0]}) with a threshold for it, or take a filter that gives {missing[0]}."
        )


def verdicts_of_image(rows: Sequence[Annotation], rule: Rule) -> list[str]:
    """Why each text of one image is dropped, or "" where it is kept. A score passes when it reaches its threshold.

    `rows`: all texts of the image.
    """
    reasons = [_verdict_alone(row, rule) for row in rows]
    if not rule.top_k and rule.keep == "all":
        return reasons
    passing = [i for i, reason in enumerate(reasons) if not reason]
    passing.sort(key=lambda i: _sort_key(rows[i], rule.rank))
    if rule.keep == "web-first":
        passing.sort(key=lambda i: rows[i].source == "synthetic")
    kept: set[str] = set()
    for i in passing:
        first = rows[passing[0]]
        if rule.keep == "web-first" and rows[i].source == "synthetic" != first.source:
            reasons[i] = f"a {first.source} text of the image passes"
        elif rows[i].text.strip() in kept:
            reasons[i] = "same text as a better one"
        elif rule.top_k and len(kept) == rule.top_k:
            reasons[i] = f"not among the {rule.top_k} best by {rule.rank}"
        elif rule.keep != "all" and kept:
            reasons[i] = f"a {first.source} text of the image ranks higher by {rule.rank}"
        else:
            kept.add(rows[i].text.strip())
    return reasons


def best_text(kept: Iterable[Annotation], rule: Rule) -> Annotation:
    """The best of an image's kept texts, by `rank` where the policy ranks (`top_k`, no threshold), else by `score`."""
    by = rule.rank if rule.top_k or rule.threshold is None else rule.score
    return min(kept, key=lambda row: _sort_key(row, by))


def _sort_key(row: Annotation, score: Score) -> tuple[float, bool, bool, int]:
    """Sorts better texts first; of equals web texts, then human ones, then the first candidate."""
    order = (row.source == "synthetic", row.source != "web", row.candidate)
    return (-_score(row, score), *order)


def _verdict_alone(row: Annotation, rule: Rule) -> str:
    """Why a text is dropped whatever the image's other texts are, or ""."""
    if row.status == "failed":
        return row.reason
    if not is_text(row.text):
        return no_text(row.reason) or NO_TEXT
    if rule.threshold is None:
        return f"no {rule.rank} score" if _missing(row, rule.rank) else ""
    reason = _below(row, rule.score, rule.threshold)
    if rule.other_threshold is not None:
        other_reason = _below(row, other_score(rule.score), rule.other_threshold)
        either = rule.combine == "or"
        reason = (reason and other_reason and f"{reason}, {other_reason}") if either else reason or other_reason
    needs_rank = rule.keep == "best" or (rule.top_k and rule.other_threshold is None)
    return reason or (f"no {rule.rank} score" if needs_rank and _missing(row, rule.rank) else "")


def _below(row: Annotation, score: Score, threshold: float) -> str:
    """Why a score does not reach a threshold, or ""."""
    if _missing(row, score):
        return f"no {score} score"
    return "" if _score(row, score) >= threshold else f"{score} below threshold"


def _missing(row: Annotation, score: Score) -> bool:
    return (row.itm if score == "itm" else row.itc) is None


def _score(row: Annotation, score: Score) -> float:
    value = row.itm if score == "itm" else row.itc
    return -2.0 if value is None else float(value)  # below every cosine


def failure_class(reason: str) -> str:
    """The class by which a failure is counted: its reason without the particulars (a position, a size, a message)."""
    return printable(re.split(r":| \(| at byte", reason, maxsplit=1)[0])


def keep_rate_threshold(scores: Iterable[np.ndarray], keep_rate: float) -> float:
    """The threshold that keeps this share of all scores; shard after shard, in bounded memory.

    Scores are counted in 2^20 bins over [-1, 1], so the threshold is exact to 2 x 10^-6.

    Args:
        scores: the scores of each shard, [n].

    Raises:
        DataError: there are no scores.
    """
    bins = 1 << 20
    counts = np.zeros(bins, np.int64)
    for of_shard in scores:
        counts += np.bincount(np.clip(((of_shard + 1) / 2 * bins).astype(np.int64), 0, bins - 1), minlength=bins)
    if not counts.any():
        raise DataError("no text has a score, so no share of them can be kept; annotate first")
    from_top = np.cumsum(counts[::-1])
    wanted = int(np.searchsorted(from_top, max(1, round(keep_rate * counts.sum()))))
    return float((bins - 1 - wanted) / bins * 2 - 1)
