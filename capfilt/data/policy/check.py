"""Refuses a policy by scores that are not there, before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from capfilt.errors import RecipeError, did_you_mean


def check_scores(needed: Iterable[str], given: Sequence[str], whose: object) -> None:
    """Refuse a policy or a calibration by scores of a filter that this one does not give. RecipeError."""
    wanted = [score for score in needed if score in ("itm", "itc")]
    if missing := [score for score in wanted if score not in given]:
        raise RecipeError(
            f"{missing[0]} is needed, and {whose} gives {', '.join(given)} alone: set score={given[0]} (and"
            f" rank={given[0]}) with a threshold for it, or take a filter that gives {missing[0]}."
        )


def check_calibrated(score: str) -> None:
    """Refuse a calibration on human pairs of a score that no filter gives to them. RecipeError."""
    if score not in ("itm", "itc"):
        raise RecipeError(
            f"threshold=calibrated is set on what a filter gives to human pairs, itm or itc, and not on {score}:"
            " give a number or keep-rate; `select --calibrate labels` takes any score."
        )


def check_further(used: Iterable[str], there: Sequence[str], whose: object, how: str) -> None:
    """Refuse a policy by scores beside itm and itc that were not added; `how` says how to add one. RecipeError."""
    if missing := [score for score in used if score not in there]:
        listed = ", ".join(["itm", "itc", *there])
        near = did_you_mean(missing[0], there)
        raise RecipeError(f"{missing[0]} is needed, and {whose} has {listed}.{near} {how}")
