"""What counts as near: equal bytes, hashes within some bits, vectors above some cosine.

A distance of 0 means equal values. Pairs at 0 form stars: each further row with the smallest row of the same value.
Pairs at a greater distance are between such smallest rows only, so that a million copies of one picture are a million
pairs and not a million times a million.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from capfilt.config import Config
from capfilt.errors import UsageError

NearKind = Literal["sha256", "phash", "vector"]

MAX_BITS = 12
"""Radius of hashes. Of a million unrelated 64-bit hashes, 100,000 pairs lie within 12 bits, and 0.002 within 3."""
MIN_COSINE = 0.5
"""Vectors of unrelated pictures reach it: in most models a lower radius has one item stand for nearly all others."""


class Near(Config):
    """One way in which two pictures are near."""

    kind: NearKind
    within: float = Field(default=0, ge=0, le=MAX_BITS)
    """The largest distance: of sha256 0, of phash the number of bits, of vectors 1 - cosine."""

    def __str__(self) -> str:
        shown = {"sha256": "", "phash": f":{self.within:g}", "vector": f":{1 - self.within:g}"}
        return self.kind + shown[self.kind]


def parse_near(text: str) -> tuple[Near, ...]:
    """Read `sha256,phash:3,vector:0.95`: bits for phash, the least cosine for vector. UsageError for anything else."""
    parts = [_parse(part.strip(), text) for part in text.split(",")]
    if len({near.kind for near in parts}) < len(parts):
        raise UsageError(f"--by {text}: a kind is named twice; give each of sha256, phash and vector once.")
    return tuple(parts)


def _parse(part: str, text: str) -> Near:
    kind, _, radius = part.partition(":")
    number = _number(radius)
    if kind == "sha256" and not radius:
        return Near(kind="sha256")
    if kind == "phash" and number.is_integer():
        if number > MAX_BITS or number < 0:
            raise UsageError(
                f"--by {part}: of 64 bits, at most {MAX_BITS} may differ: beyond that unrelated pictures are near."
            )
        return Near(kind="phash", within=number)
    if kind == "vector" and math.isfinite(number):
        if not MIN_COSINE <= number < 1:
            raise UsageError(
                f"--by {part}: the cosine must be at least {MIN_COSINE:g}, below which one picture would stand for all,"
                " and less than 1, at which none would go."
            )
        return Near(kind="vector", within=1 - number)
    raise UsageError(f"--by {text}: {part!r} is not known; write sha256, phash:BITS or vector:COSINE, as in phash:3.")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
