"""RefCOCO, RefCOCO+ and RefCOCOg: REFER's pickle of phrases and its instances.json of boxes, or X-VLM's JSON.

X-VLM's JSON has a picture, a phrase and a `ref_id`; its boxes are REFER's, unless an entry has a `bbox` of its own. The
pickle is held in memory, some 300 MB for RefCOCOg; instances.json is streamed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from capfilt.data.tasks.official.json_stream import elements
from capfilt.data.tasks.official.pickles import read_pickle
from capfilt.data.tasks.official.rows import Item, OfficialRow, OtherSplit, entries, entry_of, row
from capfilt.errors import DataError, UsageError

PICKLES = (".p", ".pkl", ".pickle")
KIND = "regions"


def read(files: Sequence[str], splits: Sequence[str]) -> Iterator[Item]:
    """The phrases of X-VLM's files where there are any, else those of REFER's in some splits; each with its box."""
    refs: list[Mapping[str, Any]] = []
    instances: list[str] = []
    listed: list[str] = []
    for url in files:
        if url.endswith(PICKLES):
            loaded = read_pickle(url)
            if not isinstance(loaded, list):
                raise DataError(f"{url} is no file of REFER: a list of references was expected.")
            refs += map(entry_of, loaded)
        else:
            (instances if next(elements(url), ("", None))[0] else listed).append(url)
    if refs and not instances:
        raise DataError(f"{', '.join(files)}: there are phrases and no boxes; give REFER's instances.json too.")
    boxes = _boxes(instances, {ref["ann_id"] for ref in refs if type(ref.get("ann_id")) is int})
    if listed and splits:
        raise UsageError(f"--split {','.join(splits)}: {listed[0]} is of one split already; leave it out.")
    if listed:
        by_ref = {ref["ref_id"]: ref.get("ann_id") for ref in refs if isinstance(ref.get("ref_id"), int | str)}
        yield from _read_listed(listed, by_ref, boxes)
        return
    if not refs:
        raise DataError(f"{', '.join(files)}: there are no phrases; give REFER's refs(...).p too, or X-VLM's JSON.")
    for number, ref in enumerate(refs):
        if ref and (split := str(ref.get("split"))) not in splits:
            yield OtherSplit(split)
            continue
        sentences = ref.get("sentences")
        if not isinstance(sentences, list) or not sentences:
            yield OfficialRow(KIND, f"refs[{number}]", (), {}, "the reference has no sentences")
            continue
        for order, sentence in enumerate(map(entry_of, sentences)):
            text = sentence.get("sent") or sentence.get("raw")
            place = f"refs[{number}][{order}]"
            yield _region(sentence.get("sent_id"), ref.get("image_id"), text, boxes.get(_key(ref.get("ann_id"))), place)


def _read_listed(files: Sequence[str], by_ref: Mapping[Any, Any], boxes: Mapping[Any, Any]) -> Iterator[Item]:
    counts: Counter[Any] = Counter()
    for url in files:
        for place, entry in entries(url):
            ref = _key(entry.get("ref_id"))
            id_ = place if ref is None else f"{ref}#{counts[ref]}"  # a reference has several phrases
            counts[ref] += 1
            box = entry.get("bbox") or boxes.get(_key(by_ref.get(ref)))
            yield _region(id_, entry.get("image"), entry.get("text"), box, place)


def _region(id_: object, picture: object, text: object, box: object, place: str) -> OfficialRow:
    value = {"id": id_, "box": box, "text": text}
    made = row(KIND, id_, (picture,), value, place)
    return replace(made, problem=made.problem or ("there is no box for it" if box is None else ""))


def _boxes(files: Sequence[str], wanted: set[int]) -> dict[Any, Any]:
    """The boxes of the annotations that are referred to, by their ids."""
    boxes = {}
    for url in files:
        for _, entry in entries(url, "annotations"):
            if _key(entry.get("id")) in wanted:
                boxes[entry["id"]] = entry.get("bbox")
    return boxes


def _key(value: object) -> int | str | None:
    """A value as an id; None for what is none, and cannot always be looked up."""
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None
