"""The texts about pictures that downstream tasks learn to answer: questions, hypotheses, statements (docs/tasks.md).

Those without an answer, as in test splits, and those that cannot be used are no rows of a training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from capfilt.data import shards
from capfilt.data.loading.config import RowKind
from capfilt.data.regions import REGIONS
from capfilt.data.sample import Sample, is_text
from capfilt.data.tasks import FailedRow, dialog_of, hypotheses_of, questions_of, statements_of
from capfilt.data.text.answers import normalise
from capfilt.data.text.dialog_texts import RoundText, training_rounds
from capfilt.errors import DataError

Answers = tuple[tuple[str, int], ...]
"""Answers, each with how many people gave it; the most frequent first."""
TRUE_FALSE = {True: "true", False: "false"}
"""The answers to a statement."""


class TaskText(NamedTuple):
    """A text about a picture."""

    text: str
    answers: Answers


def texts_of(kind: RowKind, meta: Mapping[str, Any]) -> list[TaskText]:
    """The texts of a sample's json that have an answer; those that cannot be used are left out."""
    failed: list[FailedRow] = []
    try:
        match kind:
            case "questions":
                rows = [(row.question, answers_of(map(normalise, row.answers))) for row in questions_of(meta, failed)]
            case "hypotheses":
                rows = [(row.text, answers_of([row.label or ""])) for row in hypotheses_of(meta, failed)]
            case "statements":
                rows = [
                    (row.text, answers_of([TRUE_FALSE[row.label]] if row.label is not None else []))
                    for row in statements_of(meta, failed)
                ]
            case "captions" | "rounds" | "phrases":
                rows = []
    except DataError:  # they are no list
        return []
    return [TaskText(text, answers) for text, answers in rows if answers]


def answers_of(answers: Iterable[str]) -> Answers:
    """Answers as they are learned: in lower case with single spaces, the most frequent first. Those to questions are
    spelt as VQAv2 compares them before they are counted: "two" is "2"."""
    spelled = (" ".join(answer.lower().split()) for answer in answers)
    return tuple(Counter(answer for answer in spelled if is_text(answer)).most_common())


def rounds_of(meta: Mapping[str, Any]) -> list[RoundText]:
    """The rounds of a sample's dialog that have candidates and a right one, which comes first."""
    dialog = dialog_of(meta, [])
    return [] if dialog is None else training_rounds(dialog)


def phrases_of(meta: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The regions of a sample that have a text; whether their boxes lie in the picture is known when it is decoded."""
    entries = meta.get(REGIONS)
    given = entries if isinstance(entries, list) else []
    return [one for one in given if isinstance(one, dict) and isinstance(one.get("text"), str) and is_text(one["text"])]


def count_texts(meta: Mapping[str, Any]) -> Counter[str]:
    """How many rows a sample's json has for each kind of training that it has rows for."""
    kinds: tuple[RowKind, ...] = ("questions", "hypotheses", "statements")
    counts: Counter[str] = Counter(
        {kind: count for kind in kinds if meta.get(kind) and (count := len(texts_of(kind, meta)))}
    )
    counts["phrases"] += len(phrases_of(meta))
    counts["rounds"] += len(rounds_of(meta)) if meta.get("dialog") else 0
    return +counts


def count_answers(urls: Iterable[str], least: int) -> tuple[str, ...]:
    """The answers that are the most frequent one of `least` questions at least, as VQAv2's 3,129 are of nine, the most
    frequent first, and of those the first in the alphabet; every shard is read."""
    counts = Counter[str]()
    for url in urls:
        for item in shards.read(url):
            if isinstance(item, Sample) and item.meta.get("questions"):
                counts.update(answers[0][0] for _, answers in texts_of("questions", item.meta))
    return tuple(
        answer for answer, count in sorted(counts.items(), key=lambda one: (-one[1], one[0])) if count >= least
    )
