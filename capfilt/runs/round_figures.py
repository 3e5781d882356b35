"""Reads the figures of rounds from a run's records (summary.json, log.jsonl) and checks their types, so that reports
need not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeGuard

from capfilt.errors import RunError
from capfilt.storage import documents
from capfilt.storage.paths import StoragePath

HUMAN_PAIRS = "human_pairs.json"
"""The file of a run folder with a filter's figures on human pairs against shuffled ones."""
_COUNTED = ("noise_ratio", "kept", "dropped", "failed")
"""Sections of a round in which every value is a number."""
_MEASURED = {
    "retrieval": ("tr@1", "tr@5", "ir@1", "ir@5"),
    "captioning": ("cider", "bleu4", "repeated", "distinct2"),
    "filter": ("auc", "precision", "recall", "threshold"),
}
"""Sections in which these values, where present, are numbers; there may be others."""


class TaskFigure(NamedTuple):
    """The one figure of a downstream task that tables show."""

    label: str
    key: str
    trivial: tuple[str, ...]
    """Where among the task's figures the same figure of an answer is that sees no picture."""


TASK_FIGURES = {
    "retrieval": TaskFigure("TR@1, fine-tuned", "tr@1", ("guessing", "tr@1")),
    "captioning": TaskFigure("CIDEr, fine-tuned", "cider", ("constant", "cider")),
    "vqa": TaskFigure("VQA accuracy", "accuracy", ("prior_by_question_type",)),
    "nlvr2": TaskFigure("NLVR2 accuracy", "accuracy", ("majority",)),
    "entailment": TaskFigure("entailment accuracy", "top1", ("majority",)),
    "grounding": TaskFigure("grounding IoU ≥ 0.5", "accuracy", ("random_proposal", "accuracy")),
    "dialog": TaskFigure("dialog MRR", "mrr", ("prior", "mrr")),
    "classification": TaskFigure("zero-shot top-1", "top1", ("guessing",)),
}
"""By the name of the task; a round's figures have them under `tasks`."""


def read_summary(path: StoragePath) -> tuple[list[dict[str, Any]], float]:
    """The rounds of a `summary.json` and the seconds of all of them. RunError for a malformed one."""
    tree = documents.read_object(path)
    rounds, seconds = tree.get("rounds"), tree.get("seconds")
    if not isinstance(rounds, list) or not is_number(seconds):
        raise RunError(f"{path} is no summary of a run: it must have `rounds` and `seconds`; run the command again.")
    return [check_round(each, path) for each in rounds], float(seconds)


def logged_rounds(events: Iterable[Mapping[str, Any]], path: StoragePath) -> list[dict[str, Any]]:
    """The newest entry of each round that a run has logged, in order."""
    logged = (dict(event) for event in events if event.get("event") == "round")
    newest = {each["round"]: each for each in (check_round(event, path) for event in logged)}
    return [{name: newest[r][name] for name in newest[r] if name not in ("ts", "event")} for r in sorted(newest)]


def check_round(tree: Any, path: StoragePath) -> dict[str, Any]:
    """Return the figures of one round. RunError where one that is shown is not a number."""
    if not isinstance(tree, dict) or type(tree.get("round")) is not int:
        raise RunError(f"{path} has an entry without the number of its round; run the command again.")
    stages = tree.get("stages", {})
    sections = [tree, *(stages.values() if isinstance(stages, dict) else [None])]
    valid = all(isinstance(section, dict) and _has_numbers(section) for section in sections)
    valid &= _has_task_figures(tree.get("tasks", {}))
    valid &= is_number(tree.get("seconds", 0)) and is_number(tree.get("samples_in", 0))
    if not valid or ("noise_ratio" in tree and "kept" not in tree):
        raise RunError(f"{path} has figures of round {tree['round']} that are not numbers; run the command again.")
    return tree


def _has_numbers(figures: Mapping[str, Any]) -> bool:
    """Whether everything that is shown of a round, or of one of its stages, is a number."""
    for section in (*_COUNTED, *_MEASURED):
        values = figures.get(section, {})
        if not isinstance(values, dict):
            return False
        names = values if section in _COUNTED else [name for name in _MEASURED[section] if name in values]
        if not all(is_number(values[name]) for name in names):
            return False
    return True


def _has_task_figures(tasks: Any) -> bool:
    """Whether what is shown of a round's downstream tasks is numbers."""
    if not isinstance(tasks, dict):
        return False
    return all(
        isinstance(figures, dict) and (name not in TASK_FIGURES or is_number(figures.get(TASK_FIGURES[name].key, 0)))
        for name, figures in tasks.items()
    )


def trivial(task: str, figures: Mapping[str, Any]) -> float | None:
    """What an answer to a task reaches that sees no picture; None where it was not measured."""
    value: Any = figures
    for name in TASK_FIGURES[task].trivial:
        value = value.get(name) if isinstance(value, Mapping) else None
    return float(value) if is_number(value) else None


def read_threshold(path: StoragePath) -> float:
    """The threshold in a `calibration.json`. RunError where there is none."""
    threshold = documents.read_object(path).get("threshold")
    if not is_number(threshold):
        raise RunError(f"{path} has no `threshold` that is a number; calibrate again.")
    return float(threshold)


def read_human_auc(folder: StoragePath) -> dict[str, float]:
    """By score, a filter's AUC on human pairs against shuffled ones; {} where it was not measured.

    Measured by `annotate --val` (`human_pairs.json`) and by a threshold calibrated on such pairs (`calibration.json`,
    unless that was calibrated on labels). RunError for a malformed file.
    """
    areas: dict[str, Any] = {}
    for name in ("calibration.json", HUMAN_PAIRS):
        tree = documents.read_object(path) if (path := folder / name).is_file() else {}
        measured = tree.get("auc", {})
        if name != HUMAN_PAIRS:
            on_pairs = {"auc", "score"} <= tree.keys() and "labels" not in tree
            measured = {str(tree["score"]): measured} if on_pairs else {}
        if not isinstance(measured, dict) or not all(is_number(area) for area in measured.values()):
            raise RunError(f"{path} has an `auc` that is not a number; measure it again.")
        areas |= measured
    return {score: float(areas[score]) for score in ("itm", "itc") if score in areas}


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value of JSON is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
