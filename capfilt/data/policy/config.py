"""The settings of a policy, and the `Rule` that they come to once every threshold is a number.

A field that is at its default leaves plans and fingerprints as they were before there was such a field.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, field_validator, model_validator

from capfilt.config import Config, Layer, added
from capfilt.data import scores as score_tables
from capfilt.data.text.rules import TextRules
from capfilt.errors import did_you_mean
from capfilt.printable import short_repr

FUSED = "fused"
"""The name of the weighted sum of a policy's `fused`."""
FILTER_SCORES = ("itm", "itc")
"""The scores that a filter gives; all others are added beside them."""

_BEST_OF = "best-of"
"""What `web-first` was called; plans and fingerprints say so to this day, so that older runs go on."""


def _known(name: str) -> str:
    if score_tables.is_score(name):
        return name
    known = [*score_tables.RANGES, "clip-NAME"]
    raise ValueError(f"there is no score {short_repr(name)}; there are {', '.join(known)}.{did_you_mean(name, known)}")


ScoreName = Annotated[str, AfterValidator(_known)]
Source = Literal["web", "synthetic", "human"]


def range_of(score: str) -> tuple[float, float]:
    """The least and the greatest value of a score; infinite where it has no bounds."""
    return score_tables.range_of(score) or (-math.inf, math.inf)


class Condition(Config):
    """What a score must be, beside the threshold."""

    score: ScoreName
    """Any score that the run has."""
    min: float | None = None
    """The least value that passes."""
    max: float | None = None
    """The greatest value that passes."""

    @model_validator(mode="after")
    def _possible(self) -> Condition:
        low, high = range_of(self.score)
        given = [value for value in (self.min, self.max) if value is not None]
        if not given:
            raise ValueError("a condition without a number; give min, max or both")
        if wrong := [value for value in given if not (math.isfinite(value) and low <= value <= high)]:
            raise ValueError(f"{wrong[0]:g} is compared with {self.score}, which lies in [{low:g}, {high:g}]")
        if len(given) == 2 and given[0] > given[1]:
            raise ValueError(f"min {given[0]:g} is above max {given[1]:g}, so no {self.score} passes")
        return self

    def __str__(self) -> str:
        limits = ((">=", self.min), ("<=", self.max))
        return " and ".join(f"{self.score} {sign} {limit:g}" for sign, limit in limits if limit is not None)


def _alternatives(value: Any) -> Any:
    """A condition on its own as the only one of its alternatives."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [each if isinstance(each, Sequence) and not isinstance(each, str) else [each] for each in value]
    return value


Conditions = Annotated[tuple[tuple[Condition, ...], ...], BeforeValidator(_alternatives)]


class RankConfig(Config):
    """Which texts reach their thresholds, and which of an image's texts that do are kept."""

    combine: Literal["and", "or"] = "and"
    """With `other_threshold`: whether a text must reach both thresholds, or one of them."""
    other_threshold: float | None = None
    """A threshold on the other score too (on itc where `score` is itm). For other scores there are `conditions`."""
    top_k: int = Field(default=0, ge=0)
    """How many of an image's texts, web and synthetic together, are kept, the best ones; 0 = all. BLIP-2: 2, and no
    threshold."""
    rank: ScoreName = "itc"
    """The score by which an image's texts are ranked."""
    keep: Literal["all", "web-first", "best"] = "all"
    """Of an image's texts that pass: all; web-first: the best that came with it, else the best synthetic one; best: the
    best of all, web and synthetic together."""
    shortlist: dict[ScoreName, Annotated[int, Field(ge=1)]] = added({})
    """Before `rank`, in this order: of an image's texts that pass, the best so many by another score stay.
    LAION-COCO: {clip-l14: 5} of 40."""
    sources: tuple[Source, ...] = added(())
    """Which texts are considered, by where they come from; () = all. Others are dropped, and no share counts them."""
    conditions: Conditions = added(())
    """What every text must meet beside the threshold: a list of conditions, each a score with `min` and `max`. An entry
    that is itself a list is met where one of its conditions is."""
    rules: TextRules = added(TextRules())
    """What a text must be, whatever its scores."""

    @field_validator("keep", mode="before")
    @classmethod
    def _renamed(cls, value: Any) -> Any:
        return "web-first" if value == _BEST_OF else value

    @field_validator("sources", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def record(self) -> dict[str, Any]:
        """The fields as plans and fingerprints have them, equal for equal policies of older runs."""
        fields = self.model_dump(mode="json")
        return {**fields, "keep": _BEST_OF} if self.keep == "web-first" else fields

    _has_conditions: bool = PrivateAttr(default=False)  # asked for every text, so decided once

    def model_post_init(self, _context: Any) -> None:
        """Decide what is asked for every text."""
        self._has_conditions = bool(self.conditions) or self.rules != TextRules()

    @property
    def has_conditions(self) -> bool:
        """Whether a text may fail by more than a threshold or its rank."""
        return self._has_conditions


class PolicyConfig(RankConfig):
    """How texts are chosen: the settings of `select`."""

    folder: ClassVar[str] = "select"

    score: ScoreName = "itm"
    """itm = P(match); itc = cosine; any score that was added to the run (`annotate --add-score`); or `fused`."""
    threshold: float | Literal["calibrated", "keep-rate"] | None = 0.5
    """A number (the paper's is 0.5 on itm); "calibrated": set on human validation pairs; "keep-rate": a share is
    kept; null: none, the default where `top_k` is given."""
    recall: float = Field(default=0.8, gt=0, lt=1)
    """For "calibrated": the share of the human validation pairs that must pass."""
    keep_rate: float = Field(default=0.5, gt=0, lt=1)
    """For "keep-rate": the share of the pool to keep. All that equal the last one are kept with it."""
    keep_rate_of: Literal["texts", "web", "images"] = added("texts")
    """The pool of "keep-rate": all texts with that score; those that came with the images (Nguyen et al. 2023); or the
    images, each by its best text."""
    samples_seen: int = added(0, ge=0)
    """For "keep-rate", in place of `keep_rate`: the samples that a training will see. The share becomes
    samples_seen / (max_repeats x the pool), at most all."""
    max_repeats: float = added(4.0, gt=0)
    """With `samples_seen`: how often each may be seen. Up to 4 epochs of repeated data are almost as good as new data
    (Muennighoff et al. 2023); how strictly to filter depends on the compute (Goyal et al. 2024)."""
    fused: dict[ScoreName, float] = added({})
    """Weights of scores, whose normalised values are summed into the score `fused`: {clip-l14: 0.5, sieve: 0.5}. A text
    that lacks one of them has none."""
    normalise: Literal["min-max", "z-score", "rank"] = added("min-max")
    """How the scores of `fused` are normalised over the texts that have all of them: to [0, 1] by the least and the
    greatest value (SIEVE); to mean 0 and deviation 1; or the share of values below, by 1,024 quantiles."""
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
        if self.other_threshold is not None and self.score not in FILTER_SCORES:
            raise ValueError(
                f"other_threshold is on the other of itm and itc, and score is {self.score}; give conditions"
            )
        if self.keep_rate_of == "web" and self.sources and not set(self.sources) & {"web", "human"}:
            raise ValueError("keep_rate_of web counts texts that sources leaves out; give the one or the other")
        if FUSED in self._named and not self.fused:
            raise ValueError("fused names no scores; give it their weights, such as {clip-l14: 0.5, sieve: 0.5}")
        weights = self.fused.values()
        if self.fused and (
            FUSED in self.fused or len(weights) < 2 or not all(map(math.isfinite, weights)) or 0 in weights
        ):
            raise ValueError("fused needs two scores or more, each with a weight other than 0")
        return self

    @property
    def _named(self) -> list[str]:
        """The scores that the policy names and that decide something, with repetitions."""
        alternatives = [condition.score for each in self.conditions for condition in each]
        compared = [] if self.threshold is None else [self.score]
        return [*compared, *alternatives, *self.shortlist, *([self.rank] if self.ranks else [])]

    @property
    def used_scores(self) -> tuple[str, ...]:
        """The scores beside itm and itc that must be there, those of `fused` in its place."""
        parts = (self.fused if name == FUSED else (name,) for name in self._named)
        names = dict.fromkeys(name for each in parts for name in each)
        return tuple(name for name in names if name not in FILTER_SCORES)

    @property
    def needed_scores(self) -> tuple[str, ...]:
        """The scores without which this policy keeps nothing, or cannot rank."""
        needed: list[str] = []
        if self.threshold is not None and (self.other_threshold is None or self.combine == "and"):
            needed.append(self.score)
            if self.other_threshold is not None:
                needed.append(other_score(self.score))
        needed += [each[0].score for each in self.conditions if len(each) == 1]
        needed += [*self.shortlist, *([self.rank] if self.ranks else [])]
        parts = (self.fused if name == FUSED else (name,) for name in needed)
        return tuple(dict.fromkeys(name for each in parts for name in each))

    @property
    def ranks(self) -> bool:
        """Whether the texts of an image are ranked by `rank`."""
        return self.top_k > 0 or self.keep != "all" or (self.threshold is None and not self.has_conditions)

    def check_input(self, layers: Sequence[Layer]) -> None:
        """Refuse a threshold that no score can reach or miss, and keys without effect. RecipeError.

        A key is refused only where it has no effect beside what is given with it and below it: a threshold given with
        --set may leave the `recall` of a preset without one.
        """
        for key, score in (("threshold", self.score), ("other_threshold", other_score(self.score))):
            value, givers = getattr(self, key), [layer for layer in layers if key in layer.given]
            low, high = range_of(score)
            if isinstance(value, float) and givers and not (low <= value <= high and math.isfinite(value)):
                raise givers[-1].error(
                    key, f"it is compared with {score}, which lies in [{low:g}, {high:g}]; give a number there"
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

    def rule(self, threshold: float | None, terms: Sequence[Term] = ()) -> Rule:
        """This policy with the number that its threshold came to (None for none) and the terms of its `fused`."""
        ranking = {name: getattr(self, name) for name in RankConfig.model_fields}
        return Rule(score=self.score, threshold=threshold, fused=tuple(terms), **ranking)


class Term(Config):
    """One score of a `fused` sum: its normalisation is a line through points, so that any of the three is applied
    alike and recorded whole."""

    score: str
    weight: float
    at: tuple[float, ...]
    """Values of the score, ascending, from the least to the greatest of the pool."""
    to: tuple[float, ...]
    """The normalised value of each; between two of them on a straight line."""


class Rule(RankConfig):
    """A policy whose threshold is a number: what a worker applies."""

    score: str
    threshold: float | None
    fused: tuple[Term, ...] = added(())

    @property
    def further_scores(self) -> tuple[str, ...]:
        """The scores beside itm and itc that it reads, and `fused` where it is made of them; they become columns of the
        verdicts."""
        conditions = [condition.score for each in self.conditions for condition in each]
        named = [term.score for term in self.fused] + conditions + [*self.shortlist]
        named += [self.score] if self.threshold is not None else []
        named += [self.rank] if self.top_k or self.keep != "all" or self.threshold is None else []
        further = dict.fromkeys(name for name in named if name not in (*FILTER_SCORES, FUSED))
        return (*further, *([FUSED] if self.fused else []))

    @property
    def needs_rank(self) -> bool:
        """Whether a text without the score `rank` is dropped."""
        unjudged = self.threshold is None and not self.has_conditions
        return unjudged or self.keep == "best" or (self.top_k > 0 and self.other_threshold is None)

    def __str__(self) -> str:
        """What a text must reach, in a few words."""
        words = [" or ".join(map(str, each)) for each in self.conditions]
        words = [f"({each})" if " or " in each else each for each in words]
        if self.threshold is not None:
            condition = f"{self.score} >= {self.threshold:.4f}"
            if self.other_threshold is not None:
                condition += f" {self.combine} {other_score(self.score)} >= {self.other_threshold:.4f}"
            words.insert(0, f"({condition})" if words and " or " in condition else condition)
        elif self.top_k:
            words.append(f"the {self.top_k} best by {self.rank}")
        words += ["the rules of texts"] if self.rules != TextRules() else []
        return " and ".join(words) or "any score"


def _without_effect(tree: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The keys of a policy that decide nothing beside the others, each with what it lacks."""
    threshold = tree.get("threshold", None if tree.get("top_k") else 0.5)
    if threshold != "keep-rate":
        for key in ("keep_rate", "keep_rate_of", "samples_seen"):
            yield key, "threshold=keep-rate"
    elif tree.get("samples_seen"):
        yield "keep_rate", "samples_seen=0, which else sets the share"
    if not tree.get("samples_seen"):
        yield "max_repeats", "samples_seen"
    if not tree.get("top_k") and tree.get("keep", "all") == "all":
        yield "shortlist", "top_k, keep=web-first or keep=best"
    if threshold != "calibrated":
        yield "recall", "threshold=calibrated"
    if tree.get("other_threshold") is None:
        yield "combine", "other_threshold"
    if threshold is not None and not tree.get("top_k") and tree.get("keep", "all") == "all":
        yield "rank", "top_k, keep=web-first or keep=best"
    if not tree.get("fused"):
        yield "normalise", "fused"
    named = (tree.get("score"), tree.get("rank"), *_scores_of(tree.get("conditions")), *(tree.get("shortlist") or ()))
    if FUSED not in named:
        yield "fused", "score=fused, rank=fused or a condition on it"


def _scores_of(conditions: Any) -> Iterator[Any]:
    """The scores that conditions name, as a recipe has them."""
    for each in conditions if isinstance(conditions, Iterable) else ():
        yield from (
            _scores_of(each)
            if isinstance(each, list | tuple)
            else [each.get("score") if isinstance(each, dict) else None]
        )


def other_score(score: str) -> str:
    """The other of the two scores of a filter."""
    return "itc" if score == "itm" else "itm"
