"""From planned rows and the bytes of their pictures to samples, with an outcome for every row."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from capfilt.data.images import decode as images
from capfilt.data.regions import regions_of
from capfilt.data.sample import Sample
from capfilt.data.shards.members import MAX_TEXT
from capfilt.data.tasks.official.plans import PlannedSample
from capfilt.data.tasks.official.rows import OfficialRow
from capfilt.data.tasks.rows import FailedRow
from capfilt.errors import ImageError

SIDES = ("left", "right")
OVERHANG = 1.0
"""Pixels by which a box may reach out of its picture, as rounded ones of COCO do; it is cut at the edge."""
NO_ROWS = "none of its rows can be used"

_EXTENSIONS = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp"}
_PARTICULARS = re.compile(r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]| of \d+ x \d+ pixels|^round \d+: ")


@dataclass
class Converted:
    """A sample, or why there is none, and its rows, each with its problem where it was not kept."""

    sample: Sample | None
    problem: str = ""
    rows: list[OfficialRow] = field(default_factory=list)


def convert(key: str, planned: PlannedSample, read: Callable[[str], bytes]) -> Converted:
    """Read the pictures of a sample and make it. `read` gives the bytes of a picture, or raises ImageError."""
    if planned.problem:
        return _failed(planned.rows, planned.problem)
    pictures: list[bytes] = []
    sizes: list[tuple[int, int]] = []
    extensions: list[str] = []
    for side, path in zip(SIDES, planned.pictures, strict=False):
        of_two = f"{side} picture, " if len(planned.pictures) > 1 else ""
        try:
            pictures.append(read(path))
            sizes.append(images.decode(pictures[-1]).size)
            extensions.append(_extension(pictures[-1]))
        except ImageError as error:
            return _failed(planned.rows, f"{of_two}{error}")
    outcomes, values = [], list[tuple[str, Mapping[str, Any]]]()
    for row in planned.rows:
        value, problem = (row.value, row.problem) if row.problem else _placed(row, *sizes[0])
        outcomes.append(replace(row, problem=problem))
        if not problem and value:
            values.append((row.kind, value))
    if not values:
        return Converted(None, next((row.problem for row in planned.rows if row.problem), NO_ROWS), outcomes)
    digest = hashlib.sha256(b"".join(pictures))
    meta = {
        "image": planned.pictures[0],
        "uid": digest.hexdigest()[:32],
        "sha256": hashlib.sha256(pictures[0]).hexdigest(),
        **_by_kind(values),
    }
    if len(json.dumps(meta).encode()) > MAX_TEXT:
        return _failed(planned.rows, f"more rows about one picture than {MAX_TEXT // 2**20} MiB of json")
    extras = {f"right.{extensions[1]}": pictures[1]} if len(pictures) > 1 else {}
    text = next((str(value["text"]) for kind, value in values if kind == "captions"), "")
    return Converted(Sample(key, pictures[0], extensions[0], text, meta, extras), "", outcomes)


def reason_class(reason: str) -> str:
    """A reason without its particulars, by which rows are counted."""
    general = _PARTICULARS.sub("", reason.partition(" Did you mean ")[0]).replace(" is ;", " is ...;")
    return re.split(r": | \(", general, maxsplit=1)[0].replace("  ", " ")


def _failed(rows: Sequence[OfficialRow], problem: str) -> Converted:
    return Converted(None, problem, [replace(row, problem=row.problem or problem) for row in rows])


def _extension(data: bytes) -> str:
    extension = _EXTENSIONS.get(data[:2])
    if extension is None:
        raise ImageError("the picture is a GIF or BMP; shards have JPEG, PNG and WebP")
    return extension


def _placed(row: OfficialRow, width: int, height: int) -> tuple[Mapping[str, Any], str]:
    """A row that its picture fits; for a box, cut at the edges of the picture, or why it cannot be used."""
    if row.kind != "regions":
        return row.value, ""
    value = {**row.value, "box": _cut(row.value["box"], width, height)}
    failed: list[FailedRow] = []
    regions_of({"regions": [value]}, width, height, failed)
    return value, failed[0].reason.removeprefix("region 0: ") if failed else ""


def _cut(box: Any, width: int, height: int) -> Any:
    """A box within its picture, if it reaches out of it by OVERHANG at most; any other value as it is."""
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(side, int | float) for side in box):
        return box
    left, top, wide, high = box
    right, bottom = left + wide, top + high
    if min(left, top) < -OVERHANG or right > width + OVERHANG or bottom > height + OVERHANG or min(wide, high) <= 0:
        return box
    if left >= 0 and top >= 0 and right <= width and bottom <= height:
        return box
    left, top = max(left, 0), max(top, 0)
    return [left, top, min(right, width) - left, min(bottom, height) - top]


def _by_kind(values: Sequence[tuple[str, Mapping[str, Any]]]) -> Mapping[str, Any]:
    """The keys of a json: a list of rows for each kind, but for a dialog, of which a picture has one."""
    meta: dict[str, Any] = {}
    for kind, value in values:
        if kind == "dialog":
            meta[kind] = value
        else:
            meta.setdefault(kind, []).append(value)
    return meta
