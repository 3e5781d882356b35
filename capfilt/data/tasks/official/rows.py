"""What the files of a data set say, row by row, before it is known which pictures there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeGuard

from capfilt.data.sample import is_text
from capfilt.data.tasks.dialogs import dialog_of
from capfilt.data.tasks.official.json_stream import elements
from capfilt.data.tasks.rows import FailedRow, Id, hypotheses_of, questions_of, statements_of
from capfilt.errors import DataError

Picture: TypeAlias = "str | int"
"""A picture by its name, with folders or without, or by the number at the end of its name (COCO)."""


@dataclass(frozen=True, slots=True)
class OfficialRow:
    """One row of a data set."""

    kind: str
    """The key of a sample's json under which it will lie; "relevance" for one that is part of a dialog already."""
    id: Id
    pictures: tuple[Picture, ...]
    """Its picture, or its left and right one; () where the row names none."""
    value: Mapping[str, Any]
    """As the json will have it (docs/tasks.md)."""
    problem: str = ""
    """Why it cannot be used."""
    needs_label: bool = False
    """Whether a `Label` must follow."""


@dataclass(frozen=True, slots=True)
class Label:
    """What another file says of a row: keys that are added to its value."""

    kind: str
    id: Id
    value: Mapping[str, Any]
    problem: str = ""


@dataclass(frozen=True, slots=True)
class OtherSplit:
    """A row of a split that is not wanted."""

    split: str


Item: TypeAlias = "OfficialRow | Label | OtherSplit"


def entry_of(value: object) -> Mapping[str, Any]:
    """An element of a file as an object; an empty one for anything else, whose fields then all are missing."""
    return value if isinstance(value, dict) else {}


def entries(url: str, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The elements of the array at a path of a JSON file, as `entry_of`, each with its place, `file.json[12]`."""
    found = (element for place, element in elements(url) if place == path)
    for number, element in enumerate(found):
        yield f"{url.rpartition('/')[2]}[{number}]", entry_of(element)


def row(kind: str, id_: object, pictures: tuple[object, ...], value: Mapping[str, Any], place: str) -> OfficialRow:
    """A row whose id and pictures are checked; `place` stands for an id that it lacks."""
    names = tuple(name for name in pictures if _is_picture(name))
    problem = "" if len(names) == len(pictures) else "it names no picture"
    known: Id = place
    if isinstance(id_, int | str) and not isinstance(id_, bool) and id_ != "":
        known = id_
    elif not problem:
        problem = f"its id is no whole number or text: {id_!r}"
    return OfficialRow(kind, known, names if len(names) == len(pictures) else (), value, problem)


def _is_picture(name: object) -> TypeGuard[Picture]:
    return (isinstance(name, str) and name != "") or (type(name) is int and 0 <= name < 10**18)


def check(kind: str, value: Mapping[str, Any]) -> str:
    """Why a row cannot be used, as the readers of `capfilt.data.tasks` say it, or ""."""
    if kind == "dialog":
        try:
            dialog_of({"dialog": value})
        except DataError as error:
            return str(error).removeprefix("dialog: ")
        return ""
    if kind in _READERS:
        failed: list[FailedRow] = []
        _READERS[kind]({kind: [value]}, failed)
        return failed[0].reason if failed else ""
    text = value.get("text")  # of captions and regions; boxes are checked beside their pictures
    if kind in ("captions", "regions") and not (isinstance(text, str) and is_text(text)):
        return f"text has nothing to read: {text!r}"
    return ""


_READERS: Mapping[str, Any] = {"questions": questions_of, "statements": statements_of, "hypotheses": hypotheses_of}
