"""VisDial 1.0: a JSON of dialogs, whose texts are numbers in two lists, and dense annotations, one round a dialog.

The two lists and the dense annotations are held in memory, some 150 MB for the training split; dialogs are streamed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from capfilt.data.tasks.official.json_stream import elements
from capfilt.data.tasks.official.rows import Item, OfficialRow, check, entries, entry_of, row
from capfilt.errors import DataError

_ALONE = {"id": 0, "caption": "one round"}
Key = tuple[Any, Any]
"""The id of a picture and the number of a round, from 1."""


def read(files: Sequence[str], splits: Sequence[str]) -> Iterator[Item]:
    """The dialogs with what dense annotations say of them; an annotation is a row of its own, of kind "relevance"."""
    dialogs = []
    dense: dict[Key, list[Any]] = {}
    for url in files:
        path = next(elements(url), ("", None))[0]
        if path.startswith("data."):
            dialogs.append(url)
            continue
        if path != "":
            raise DataError(f'{url} is no file of VisDial: neither {{"data": {{...}}}} nor a list of annotations.')
        yield from _read_dense(url, dense)
    if not dialogs:
        raise DataError(f"{', '.join(files)}: there are no dialogs; give visdial_1.0_....json too.")
    for url in dialogs:
        yield from _read_dialogs(url, dense)
    for image, number in dense:
        id_ = f"{image}:{number}"
        yield OfficialRow("relevance", id_, (), {}, "there is no such round of a dialog")


def _read_dense(url: str, dense: dict[Key, list[Any]]) -> Iterator[Item]:
    for place, entry in entries(url):
        image, round_ = entry.get("image_id"), entry.get("round_id")
        values = entry.get("gt_relevance", entry.get("relevance"))
        if type(image) is not int or type(round_) is not int or not isinstance(values, list):
            yield OfficialRow("relevance", place, (), {}, "it has no image_id, round_id and gt_relevance")
        elif (image, round_) in dense:
            yield OfficialRow("relevance", place, (), {}, "the round has relevances already")
        else:
            dense[image, round_] = values


def _read_dialogs(url: str, dense: dict[Key, list[Any]]) -> Iterator[Item]:
    texts: dict[str, list[Any]] = {"data.questions": [], "data.answers": []}
    for path, element in elements(url):
        if path in texts:
            texts[path].append(element)
    for place, entry in entries(url, "data.dialogs"):
        image, rounds, problem = entry.get("image_id"), [], ""
        try:
            rounds = _rounds(entry.get("dialog"), texts["data.questions"], texts["data.answers"])
        except DataError as error:
            problem = str(error)
        relevances = list(_add_relevances(image, rounds, dense))
        dialog = row("dialog", image, (image,), {"id": image, "caption": entry.get("caption"), "rounds": rounds}, place)
        dialog = replace(dialog, problem=dialog.problem or problem or check("dialog", dialog.value))
        yield dialog
        for one in relevances:
            yield replace(one, problem=one.problem or (dialog.problem and "its dialog failed"))


def _picture(image: object) -> tuple[int, ...]:
    return (image,) if type(image) is int and image >= 0 else ()


def _rounds(dialog: object, questions: Sequence[Any], answers: Sequence[Any]) -> list[dict[str, Any]]:
    """The rounds of a dialog with texts in place of numbers; DataError for a number that no text has."""
    if not isinstance(dialog, list) or not dialog:
        raise DataError("it has no rounds")
    rounds = []
    for place, one in enumerate(map(entry_of, dialog), 1):
        if "question" not in one:
            raise DataError(f"a round has no question: round {place}")
        each: dict[str, Any] = {"question": _text(questions, one["question"], "question", place)}
        if one.get("answer") is not None:
            each["answer"] = _text(answers, one["answer"], "answer", place)
        options = one.get("answer_options")
        if options is not None and not isinstance(options, list):
            raise DataError(f"answer_options is no list: round {place}")
        if options:
            each["options"] = [_text(answers, option, "option", place) for option in options]
        if one.get("gt_index") is not None:
            each["gt_index"] = one["gt_index"]
        rounds.append(each)
    return rounds


def _text(texts: Sequence[Any], number: object, what: str, place: int) -> Any:
    if type(number) is not int or not 0 <= number < len(texts):
        raise DataError(f"a number of the {what} leads to no text: {number!r} in round {place}")
    return texts[number]


def _add_relevances(image: Any, rounds: list[dict[str, Any]], dense: dict[Key, list[Any]]) -> Iterator[OfficialRow]:
    """Put relevances into the rounds that have them; a row for each, with why it cannot be used."""
    for number, one in enumerate(rounds, 1):
        values = dense.pop((image, number), None)
        if values is None:
            continue
        options, problem = one.get("options", []), ""
        if len(values) != len(options):
            problem = f"it has another length than the options: {len(values)} and {len(options)}"
        elif problem := check("dialog", {**_ALONE, "rounds": [{**one, "relevance": values}]}):
            problem = problem.removeprefix("round 0: ")
        else:
            one["relevance"] = values
        yield OfficialRow("relevance", f"{image}:{number}", _picture(image), {}, problem)
