"""Questions, statements and hypotheses about a picture, as the json of its sample has them (docs/tasks.md).

Ids are compared as text, as 1 and "1" name the same row of a result file; within a sample none may come twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from capfilt.data.sample import is_text
from capfilt.data.shards.members import IMAGES
from capfilt.errors import DataError, did_you_mean

ENTAILMENT_LABELS = ("entailment", "neutral", "contradiction")

Id = int | str


@dataclass(frozen=True)
class FailedRow:
    """A row that cannot be used: its id, or its place where it has none, and why."""

    id: Id
    reason: str


@dataclass(frozen=True)
class Question:
    """A question about a picture, and what people answered: ten of them in VQAv2, none in a test split."""

    id: Id
    question: str
    answers: tuple[str, ...] = ()
    question_type: str | None = None
    answer_type: str | None = None


@dataclass(frozen=True)
class Statement:
    """A statement about two pictures that is true or false; None in a test split."""

    id: Id
    text: str
    label: bool | None = None
    group: str | None = None
    """Statements of one group count together for consistency."""


@dataclass(frozen=True)
class Hypothesis:
    """A text whose premise is the picture; its label is one of ENTAILMENT_LABELS, None in a test split."""

    id: Id
    text: str
    label: str | None = None


def questions_of(meta: Mapping[str, Any], failed: list[FailedRow] | None = None) -> list[Question]:
    """The questions of a sample's json; none where it has none.

    DataError where `questions` is no list, or one of them cannot be used: it goes into `failed` instead, where given.
    """
    return read_rows(meta, "questions", _question, failed)


def statements_of(meta: Mapping[str, Any], failed: list[FailedRow] | None = None) -> list[Statement]:
    """The statements of a sample's json; as `questions_of`."""
    return read_rows(meta, "statements", _statement, failed)


def hypotheses_of(meta: Mapping[str, Any], failed: list[FailedRow] | None = None) -> list[Hypothesis]:
    """The hypotheses of a sample's json; as `questions_of`."""
    return read_rows(meta, "hypotheses", _hypothesis, failed)


def _question(id_: Id, entry: Mapping[str, Any]) -> Question:
    return Question(
        id_,
        text_of(entry, "question"),
        strings_of(entry, "answers"),
        optional_text(entry, "question_type"),
        optional_text(entry, "answer_type"),
    )


def _statement(id_: Id, entry: Mapping[str, Any]) -> Statement:
    label = entry.get("label")
    if label is not None and not isinstance(label, bool):
        raise DataError(f"label is {label!r}; it is true or false")
    return Statement(id_, text_of(entry, "text"), label, optional_text(entry, "group"))


def _hypothesis(id_: Id, entry: Mapping[str, Any]) -> Hypothesis:
    label = entry.get("label")
    if label is not None and label not in ENTAILMENT_LABELS:
        hint = did_you_mean(label, ENTAILMENT_LABELS) if isinstance(label, str) else ""
        raise DataError(f"label is {label!r}; it is one of {', '.join(ENTAILMENT_LABELS)}.{hint}")
    return Hypothesis(id_, text_of(entry, "text"), label)


# ---- the second picture of a pair ----

RIGHT = tuple(f"right.{extension}" for extension in IMAGES)
"""The extensions of a right picture, as the `extras` of a sample have them."""


def right_picture(extras: Mapping[str, bytes]) -> bytes:
    """The bytes of a sample's right picture, still encoded; its left one is its `image`.

    `shards.read(url, extras=True)` reads it; without `extras` samples come without their second picture.

    Raises:
        DataError: there is none, or several of several formats.
    """
    names = [name for name in RIGHT if name in extras]
    if len(names) == 1:
        return extras[names[0]]
    what = f"there are several right pictures ({', '.join(names)})" if names else "there is no right picture"
    raise DataError(f"{what}; a pair is KEY.jpg, the left one, and KEY.right.jpg (or png, webp)")


# ---- what the readers of all tasks share ----

Row = TypeVar("Row")


def read_rows(
    meta: Mapping[str, Any], key: str, parse: Callable[[Id, Mapping[str, Any]], Row], failed: list[FailedRow] | None
) -> list[Row]:
    """The rows that a json has under `key`, each made by `parse`, which raises DataError for one that it cannot use."""
    entries = meta.get(key)
    if entries is None:
        return []
    if not isinstance(entries, list):
        raise DataError(f"{key} is {type(entries).__name__}; it is a list of objects (docs/tasks.md)")
    rows, seen = [], set[str]()
    for number, entry in enumerate(entries):
        id_: Id = f"{key}[{number}]"
        try:
            if not isinstance(entry, dict):
                raise DataError(f"it is {type(entry).__name__}; it is an object (docs/tasks.md)")
            id_ = id_of(entry)
            if str(id_) in seen:
                raise DataError("its id comes twice in one sample")
            seen.add(str(id_))
            rows.append(parse(id_, entry))
        except DataError as error:
            if failed is None:
                raise DataError(f"{key}[{number}]: {error}") from None
            failed.append(FailedRow(id_, str(error)))
    return rows


def id_of(entry: Mapping[str, Any]) -> Id:
    """The id of a row, a whole number or a text; DataError for any other, or none."""
    id_ = entry.get("id")
    if isinstance(id_, bool) or not isinstance(id_, int | str) or id_ == "":
        raise DataError(f"id is {id_!r}; it is a whole number or a text")
    return id_


def text_of(entry: Mapping[str, Any], name: str) -> str:
    """A field that must have something to read (`sample.is_text`)."""
    text = entry.get(name)
    if not isinstance(text, str) or not is_text(text):
        raise DataError(f"{name} is {text!r}; it is a text with something to read")
    return text


def optional_text(entry: Mapping[str, Any], name: str) -> str | None:
    """A field that may be absent, and is a text otherwise."""
    text = entry.get(name)
    if text is not None and not isinstance(text, str):
        raise DataError(f"{name} is {text!r}; it is a text")
    return text


def strings_of(entry: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """A field that is a list of texts, of whatever they say; empty where it is absent."""
    texts = entry.get(name)
    if texts is None:
        return ()
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{name} is no list of texts")
    return tuple(texts)
