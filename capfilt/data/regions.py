"""Regions of a picture with texts of their own, as the json of a shard's sample has them (docs/shards.md).

`regions: [{"box": [x, y, w, h], "text": "..."}]`, in pixels of the picture as it stands upright: its left edge, its
upper edge, its width and its height. A region may have an `id`; what else it has is left alone. `proposals` are boxes
without texts, which a detector gave.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from capfilt.data.sample import is_text
from capfilt.data.tasks.rows import FailedRow
from capfilt.errors import DataError

REGIONS = "regions"
"""The key of the json."""


class Region(NamedTuple):
    """A part of a picture, pixels, and what is said of it."""

    left: float
    top: float
    width: float
    height: float
    text: str
    id: int | str | None = None


class Proposal(NamedTuple):
    """A part of a picture that a detector proposes, pixels, and the detector's score, where it gave one."""

    left: float
    top: float
    width: float
    height: float
    score: float | None = None


def has_regions(meta: Mapping[str, Any]) -> bool:
    """Whether a sample's json has regions, right or wrong."""
    return bool(meta.get(REGIONS))


def regions_of(meta: Mapping[str, Any], width: int, height: int, failed: list[FailedRow] | None = None) -> list[Region]:
    """The regions of a sample whose picture has this size; none where its json has none.

    DataError where `regions` is no list, or a region is none, is empty, or lies outside the picture: such regions go
    into `failed` instead, where that is given.
    """
    entries = meta.get(REGIONS) or []
    if not isinstance(entries, list):
        raise DataError(f'regions is {type(entries).__name__}; it is a list of {{"box": [x, y, w, h], "text": ...}}')
    regions = []
    for number, entry in enumerate(entries):
        try:
            regions.append(_region(f"region {number}", entry, width, height))
        except DataError as error:
            if failed is None:
                raise
            failed.append(FailedRow(_id(entry) or f"region {number}", str(error)))
    return regions


def proposals_of(meta: Mapping[str, Any], width: int, height: int) -> list[Proposal]:
    """The boxes that a detector proposed for a picture of this size; none where its json has none. DataError for one
    that is no box, is empty, or lies outside the picture, and for a score that is no number."""
    entries = meta.get("proposals") or []
    if not isinstance(entries, list):
        raise DataError(f'proposals is {type(entries).__name__}; it is a list of {{"box": [x, y, w, h]}}')
    proposals = []
    for number, entry in enumerate(entries):
        place = f"proposal {number}"
        score = entry.get("score") if isinstance(entry, dict) else None
        if score is not None and not _is_number(score):
            raise DataError(f"{place}: score is {score!r}; it is a number")
        box = _box(place, entry.get("box") if isinstance(entry, dict) else None, width, height)
        proposals.append(Proposal(*box, None if score is None else float(score)))
    return proposals


def _region(place: str, entry: object, width: int, height: int) -> Region:
    text = entry.get("text") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(text, str) or not is_text(text):
        raise DataError(f'{place} has no text; a region is {{"box": [x, y, w, h], "text": ...}}')
    return Region(*_box(place, entry.get("box"), width, height), text, _id(entry))


def _id(entry: object) -> int | str | None:
    id_ = entry.get("id") if isinstance(entry, dict) else None
    return id_ if isinstance(id_, int | str) and not isinstance(id_, bool) else None


def _box(place: str, box: object, width: int, height: int) -> tuple[float, float, float, float]:
    """A box that lies in the picture and is not empty: its left and upper edge, its width and height."""
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(_is_number(side) for side in box):
        raise DataError(f"{place}: box is {box}; it is four numbers of pixels, [x, y, w, h]")
    left, top, wide, high = (float(side) for side in box)
    if wide <= 0 or high <= 0:
        raise DataError(f"{place}: box {box} is empty; its width and height are above 0")
    if left < 0 or top < 0 or left + wide > width or top + high > height:
        raise DataError(f"{place}: box {box} lies outside the picture of {width} x {height} pixels")
    return left, top, wide, high


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
