"""Regions of a picture with texts of their own, as the json of a shard's sample has them (docs/shards.md).

`regions: [{"box": [x, y, w, h], "text": "..."}]`, in pixels of the picture as it stands upright: its left edge, its
upper edge, its width and its height. What else a region has is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from capfilt.data.sample import is_text
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


def has_regions(meta: Mapping[str, Any]) -> bool:
    """Whether a sample's json has regions, right or wrong."""
    return bool(meta.get(REGIONS))


def regions_of(meta: Mapping[str, Any], width: int, height: int) -> list[Region]:
    """The regions of a sample whose picture has this size; none where its json has none.

    Raises:
        DataError: one that is no region, is empty, or lies outside the picture.
    """
    found = meta.get(REGIONS) or []
    if not isinstance(found, list):
        raise DataError(f'regions is {type(found).__name__}; it is a list of {{"box": [x, y, w, h], "text": ...}}')
    return [_region(number, entry, width, height) for number, entry in enumerate(found)]


def _region(number: int, entry: object, width: int, height: int) -> Region:
    place, box, text = f"region {number}", None, None
    if isinstance(entry, dict):
        box, text = entry.get("box"), entry.get("text")
    if not isinstance(text, str) or not is_text(text):
        raise DataError(f'{place} has no text; a region is {{"box": [x, y, w, h], "text": ...}}')
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(_is_number(side) for side in box):
        raise DataError(f"{place}: box is {box}; it is four numbers of pixels, [x, y, w, h]")
    left, top, wide, high = (float(side) for side in box)
    if wide <= 0 or high <= 0:
        raise DataError(f"{place}: box {box} is empty; its width and height are above 0")
    if left < 0 or top < 0 or left + wide > width or top + high > height:
        raise DataError(f"{place}: box {box} lies outside the picture of {width} x {height} pixels")
    return Region(left, top, wide, high, text)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
