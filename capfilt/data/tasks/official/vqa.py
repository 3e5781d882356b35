"""VQAv2: a JSON of questions, and one of annotations with ten answers each, which a test split lacks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from capfilt.data.tasks.official.json_stream import elements
from capfilt.data.tasks.official.rows import Item, Label, entries, row
from capfilt.data.tasks.rows import Id
from capfilt.errors import DataError

KIND = "questions"


def read(files: Sequence[str], splits: Sequence[str]) -> Iterator[Item]:
    """The questions of all files, then what the annotations say of them; both may be several, in any order."""
    of_kind: dict[str, list[str]] = {"questions": [], "annotations": []}
    for url in files:
        path = next(elements(url), ("", None))[0]
        if path not in of_kind:
            raise DataError(f'{url} is no file of VQAv2: it begins with neither "questions": [ nor "annotations": [.')
        of_kind[path].append(url)
    if not of_kind["questions"]:
        raise DataError(f"{', '.join(files)}: there are no questions; give v2_OpenEnded_mscoco_..._questions.json too.")
    for place, entry in (found for url in of_kind["questions"] for found in entries(url, "questions")):
        id_, value = entry.get("question_id"), {"id": entry.get("question_id"), "question": entry.get("question")}
        question = row(KIND, id_, (entry.get("image_id"),), value, place)
        yield replace(question, needs_label=bool(of_kind["annotations"]))
    for place, entry in (found for url in of_kind["annotations"] for found in entries(url, "annotations")):
        id_ = entry.get("question_id")
        known: Id = id_ if isinstance(id_, int | str) else place
        answers = entry.get("answers")
        value = {name: entry[name] for name in ("question_type", "answer_type") if name in entry}
        if not isinstance(answers, list) or not answers:
            yield Label(KIND, known, value, "the question has no answers")
            continue
        value["answers"] = [one.get("answer") if isinstance(one, dict) else one for one in answers]
        yield Label(KIND, known, value)
