"""The self-test: which share of copies of held-out pictures would be found, before a pool is called clean.

A descriptor that finds all copies may do so by taking all pictures for each other, so what counts as well is how many
of the tested pictures have *another* held-out picture within the radius.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from capfilt.data.images.copies import COPIES
from capfilt.stages.near.decontaminate.criteria import Criteria
from capfilt.stages.near.decontaminate.references import ITSELF, MIRRORED, HeldOut

PLAIN_COPIES = ("jpeg 95", "jpeg 75", "half size")
"""The copies that any descriptor must find."""
MIN_RECALL = 0.9
MAX_CONFUSED = 0.1


@dataclass(frozen=True)
class SelfTest:
    """What one kind of nearness finds."""

    kind: str
    pictures: int
    """Held-out pictures of which copies were made."""
    recall: dict[str, float]
    """By kind of copy, the share that lies within the radius of its picture or of its mirror image."""
    confused: float
    """The share of the tested pictures with another held-out picture within the radius."""

    @property
    def problem(self) -> str:
        """Why nothing that this kind does not find is proved clean; "" where it works."""
        if not self.pictures:
            return "there is no held-out picture to test it on"
        missed = [f"{copy} {self.recall[copy]:.0%}" for copy in PLAIN_COPIES if self.recall[copy] < MIN_RECALL]
        if missed:
            return f"it finds too few plain copies ({', '.join(missed)}; {MIN_RECALL:.0%} are asked for)"
        if self.confused > MAX_CONFUSED:
            return f"it takes {self.confused:.0%} of the held-out pictures for another held-out picture"
        return ""

    def record(self) -> dict[str, Any]:
        return {"pictures": self.pictures, "recall": self.recall, "confused": self.confused}


def run(held_out: HeldOut, criteria: Criteria, vectors: str | None) -> list[SelfTest]:
    """Test each kind of nearness that compares more than bytes; `vectors`: what the vectors are."""
    tests = []
    if (bits := criteria.within("phash")) is not None:
        tests.append(_test("phash", held_out, bits))
    if (within := criteria.within("vector")) is not None and vectors is not None:
        tests.append(_test(vectors, held_out, within))
    return tests


def _test(kind: str, held_out: HeldOut, radius: float) -> SelfTest:
    values = held_out.hashes if kind == "phash" or held_out.vectors is None else held_out.vectors.astype(np.float32)
    names = list(zip(held_out.sets, held_out.keys, held_out.uids, strict=True))
    references = np.flatnonzero(np.isin(held_out.copies, [ITSELF, MIRRORED]))
    rows_of: dict[Any, list[int]] = {}
    for row in references.tolist():
        rows_of.setdefault(names[row], []).append(row)
    made, found, tested = Counter[str](), Counter[str](), dict[Any, int]()
    for row in np.flatnonzero(np.isin(held_out.copies, list(COPIES))).tolist():
        own = np.array(rows_of[names[row]])
        made[held_out.copies[row]] += 1
        found[held_out.copies[row]] += bool((_distances(values, row, own) <= radius).any())
        tested[names[row]] = rows_of[names[row]][0]
    confused = 0
    for row in tested.values():
        near = _distances(values, row, references) <= radius
        confused += bool((near & (held_out.sha256[references] != held_out.sha256[row])).any())
    recall = {copy: round(found[copy] / made[copy], 4) for copy in COPIES if made[copy]}
    return SelfTest(kind, len(tested), recall, round(confused / len(tested), 4) if tested else 0.0)


def _distances(values: np.ndarray, row: int, others: np.ndarray) -> np.ndarray:
    """From one row to others: bits of hashes, 1 - cosine of vectors."""
    hashes = values.ndim == 1
    found: np.ndarray = np.bitwise_count(values[others] ^ values[row]) if hashes else 1 - values[others] @ values[row]
    return found
