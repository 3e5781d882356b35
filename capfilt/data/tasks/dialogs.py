"""The dialog about a picture, as the json of its sample has it (docs/tasks.md).

A round whose candidate answers cannot be used still is history for those after it: it stays, without candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from capfilt.data.tasks.rows import FailedRow, Id, id_of, optional_text, strings_of, text_of
from capfilt.errors import DataError


@dataclass(frozen=True)
class DialogRound:
    """A question, its answer, and the candidates to rank: 100 of them in VisDial."""

    question: str
    answer: str | None = None
    """None in the last round of a test split."""
    options: tuple[str, ...] = ()
    gt_index: int | None = None
    """Which of the options is the answer."""
    relevance: tuple[float, ...] | None = None
    """How many of the annotators, as a share, call each option right; None where nobody was asked."""


@dataclass(frozen=True)
class Dialog:
    """A caption, and rounds of question and answer about a picture; `id` is the picture's in VisDial."""

    id: Id
    caption: str
    rounds: tuple[DialogRound, ...]


def dialog_of(meta: Mapping[str, Any], failed: list[FailedRow] | None = None) -> Dialog | None:
    """The dialog of a sample's json; None where it has none, or where it cannot be used as a whole.

    DataError where the dialog or one of its rounds cannot be used: a round goes into `failed` by "ID:NUMBER", the
    dialog by its id, where that is given.
    """
    entry = meta.get("dialog")
    if entry is None:
        return None
    id_: Id = "dialog"
    try:
        if not isinstance(entry, dict) or not isinstance(entry.get("rounds"), list):
            raise DataError("it is no object with an id, a caption and rounds (docs/tasks.md)")
        id_ = id_of(entry)
        rounds = [_texts_of_round(number, one) for number, one in enumerate(entry["rounds"])]
        dialog = Dialog(id_, text_of(entry, "caption"), ())
    except DataError as error:
        if failed is None:
            raise DataError(f"dialog: {error}") from None
        failed.append(FailedRow(id_, str(error)))
        return None
    for number, one in enumerate(rounds):
        try:
            rounds[number] = _with_options(one, entry["rounds"][number])
        except DataError as error:
            if failed is None:
                raise DataError(f"dialog: round {number}: {error}") from None
            failed.append(FailedRow(f"{id_}:{number}", str(error)))
    return Dialog(dialog.id, dialog.caption, tuple(rounds))


def _texts_of_round(number: int, entry: object) -> DialogRound:
    try:
        if not isinstance(entry, dict):
            raise DataError("it is no object with a question")
        return DialogRound(text_of(entry, "question"), optional_text(entry, "answer"))
    except DataError as error:
        raise DataError(f"round {number}: {error}") from None


def _with_options(one: DialogRound, entry: Mapping[str, Any]) -> DialogRound:
    """The round with its candidates; DataError where they and what is said of them do not fit together."""
    options = strings_of(entry, "options")
    gt_index, relevance = entry.get("gt_index"), entry.get("relevance")
    if gt_index is not None and (type(gt_index) is not int or not 0 <= gt_index < len(options)):
        raise DataError(f"gt_index is {gt_index!r}; it is the number of one of the {len(options)} options, from 0")
    if relevance is None:
        return DialogRound(one.question, one.answer, options, gt_index)
    if not isinstance(relevance, list) or not all(_is_share(value) for value in relevance):
        raise DataError("relevance is no list of numbers from 0 to 1")
    if len(relevance) != len(options):
        raise DataError(f"relevance has {len(relevance)} numbers for {len(options)} options")
    return DialogRound(one.question, one.answer, options, gt_index, tuple(map(float, relevance)))


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
