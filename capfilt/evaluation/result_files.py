"""Answers in the files that the servers of VQA and VisDial take."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from numpy.typing import ArrayLike

from capfilt.errors import DataError
from capfilt.evaluation.metrics.dialog import ranks
from capfilt.evaluation.metrics.rows import check_unique
from capfilt.storage.atomic import write_json
from capfilt.storage.paths import StoragePath


def write_vqa(path: StoragePath, answers: Iterable[tuple[int | str, str]]) -> int:
    """Write [{question_id, answer}] and return how many. DataError where a question is answered twice."""
    rows = [{"question_id": question, "answer": answer} for question, answer in answers]
    check_unique("question", [row["question_id"] for row in rows])
    write_json(path, rows)
    return len(rows)


def write_visdial(path: StoragePath, rounds: Iterable[tuple[int | str, int, ArrayLike]]) -> int:
    """Write [{image_id, round_id, ranks}] of (dialog, round from 1 on, scores of its candidates); return how many.

    The server of the test split wants one round a dialog, the last; which ones are written is the caller's choice.

    Raises:
        DataError: a round from below 1, or one that comes twice.
    """
    rows: list[dict[str, Any]] = [
        {"image_id": dialog, "round_id": number, "ranks": ranks(scores)} for dialog, number, scores in rounds
    ]
    check_unique("round", [(row["image_id"], row["round_id"]) for row in rows])
    for row in rows:
        if row["round_id"] < 1:
            raise DataError(f"dialog {row['image_id']} has a round {row['round_id']}; VisDial counts them from 1.")
    write_json(path, rows)
    return len(rows)
