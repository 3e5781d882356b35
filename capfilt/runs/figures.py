"""The figures of a run as its records have them, checked: whoever shows them may rely on what they are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

from capfilt.errors import RunError
from capfilt.storage import documents
from capfilt.storage.paths import StoragePath

_COUNTED = ("noise_ratio", "kept", "dropped", "failed")
"""Sections of an entry in which every value is a number."""
_MEASURED = {
    "retrieval": ("tr@1", "tr@5", "ir@1", "ir@5"),
    "captioning": ("cider", "bleu4", "repeated", "distinct2"),
    "filter": ("auc", "precision", "recall", "threshold"),
}
"""Sections in which these values are numbers where there are any; there may be others."""


def summary(path: StoragePath) -> tuple[list[dict[str, Any]], float]:
    """The rounds of a `summary.json` and the seconds of them all. RunError for what is none."""
    found = documents.read_object(path)
    rounds, seconds = found.get("rounds"), found.get("seconds")
    if not isinstance(rounds, list) or not is_number(seconds):
        raise RunError(f"{path} is no summary of a run: it must have `rounds` and `seconds`; run the command again.")
    return [entry(each, path) for each in rounds], float(seconds)


def logged(events: Iterable[Mapping[str, Any]], path: StoragePath) -> list[dict[str, Any]]:
    """The newest entry of each round that a run has logged, in order."""
    told = (dict(event) for event in events if event.get("event") == "round")
    newest = {each["round"]: each for each in (entry(event, path) for event in told)}
    return [{name: newest[r][name] for name in newest[r] if name not in ("ts", "event")} for r in sorted(newest)]


def entry(tree: Any, path: StoragePath) -> dict[str, Any]:
    """What a record has of one round. RunError for what is none."""
    if not isinstance(tree, dict) or type(tree.get("round")) is not int:
        raise RunError(f"{path} has an entry without the number of its round; run the command again.")
    stages = tree.get("stages", {})
    every = [tree, *(stages.values() if isinstance(stages, dict) else [None])]
    sound = all(isinstance(own, dict) and _sound(own) for own in every)
    sound &= is_number(tree.get("seconds", 0)) and is_number(tree.get("samples_in", 0))
    if not sound or ("noise_ratio" in tree and "kept" not in tree):
        raise RunError(f"{path} has figures of round {tree['round']} that are no figures; run the command again.")
    return tree


def _sound(own: Mapping[str, Any]) -> bool:
    """Whether whatever is shown of an entry, or of one of its stages, is a number."""
    for section in (*_COUNTED, *_MEASURED):
        values = own.get(section, {})
        if not isinstance(values, dict):
            return False
        names = values if section in _COUNTED else [name for name in _MEASURED[section] if name in values]
        if not all(is_number(values[name]) for name in names):
            return False
    return True


def calibrated(path: StoragePath) -> float:
    """The threshold that a `calibration.json` tells."""
    threshold = documents.read_object(path).get("threshold")
    if not is_number(threshold):
        raise RunError(f"{path} has no `threshold` that is a number; calibrate again.")
    return float(threshold)


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value of JSON is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
