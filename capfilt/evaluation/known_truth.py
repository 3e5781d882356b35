"""Web texts of which a shard says whether they match their image, and how well a filter's scores tell them apart.

Nothing that trains or filters may read the truth.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from capfilt.data import shards
from capfilt.data.sample import FailedSample, Sample
from capfilt.evaluation.metrics import matching
from capfilt.printable import printable, short_repr
from capfilt.runs.tally import OTHER

Truth = tuple[bool, str]
"""Whether a web text matches its image, and what kind of text it is: "right", or the way in which it is wrong."""
MAX_KIND = 64
"""Characters of a kind; the shard that names it is anybody's."""
MAX_KINDS = 64
"""Kinds that have a figure of their own; what comes after them is "other"."""


@dataclass
class ScoredTexts:
    """Web texts of known truth, with a filter's scores."""

    scores: list[float] = field(default_factory=list)
    matches: list[bool] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    counted_kinds: set[str] = field(default_factory=set)

    def add(self, score: float, known: Truth) -> None:
        self.scores.append(score)
        self.matches.append(known[0])
        if len(self.counted_kinds) < MAX_KINDS:
            self.counted_kinds.add(known[1])
        self.kinds.append(known[1] if known[1] in self.counted_kinds else OTHER)

    def figures(self, threshold: float) -> dict[str, Any]:
        """Threshold, AUC, precision, recall and AUC by kind; {} when there is no such text."""
        if not self.scores:
            return {}
        return dict(matching.report(np.array(self.scores), np.array(self.matches), self.kinds, threshold))


def truth(sample: Sample) -> Truth | None:
    """Whether the web text of a sample matches, and its kind, where the sample says so."""
    said = sample.meta.get("truth")
    if isinstance(said, dict) and {"matches", "kind"} <= said.keys():
        kind = said["kind"]
        return bool(said["matches"]), printable(kind if isinstance(kind, str) else short_repr(kind), MAX_KIND)
    return None


def says_truth(url: str) -> bool:
    """Whether a shard says of its first sample whether the web text matches; the rest of it is not read."""
    first = next((item for item in shards.read(url) if not isinstance(item, FailedSample)), None)
    return first is not None and truth(first) is not None


def truths(url: str) -> dict[str, Truth]:
    """The truth of every web text of a shard by uid; {} for a shard whose first sample has none, the rest of which is
    not read."""
    known: dict[str, Truth] = {}
    for item in shards.read(url):
        if isinstance(item, FailedSample):
            continue
        of_item = truth(item)
        if of_item is not None:
            known[item.uid] = of_item
        elif not known:
            break
    return known
