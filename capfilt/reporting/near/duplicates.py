"""The page of a deduplication: what goes and by what, groups by their size, and a gallery of pairs near the radius.

All rows are counted; the gallery has a bounded number of pairs, of bounded many shards: the ones farthest apart, which
are the first that may be wrong, and some at random.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from capfilt.data import duplicates, shards
from capfilt.data.duplicates import FOLDER
from capfilt.printable import MAX_MESSAGE, printable
from capfilt.reporting.near.records import Deduplicated, Deduplicating, check
from capfilt.reporting.page import fill
from capfilt.reporting.sampling import ImageId
from capfilt.reporting.sections import Cell
from capfilt.reporting.thumbnails import thumbnails
from capfilt.runs.run import Run
from capfilt.stages import inputs
from capfilt.storage import documents
from capfilt.storage.paths import StoragePath, listing

SCRIPTS = ("dom.js", "viewer.js", "duplicates.js")
MAX_PAIRS = 240
"""Pairs of each kind that are collected; half of them the farthest apart."""
MAX_SHARDS = 24
"""Shards that are read for pictures."""

Row = Mapping[str, Any]


@dataclass
class _Kind:
    """What is collected of one kind."""

    counts: Counter[float] = field(default_factory=Counter)
    """Pictures that go, by distance, in steps."""
    far: list[Any] = field(default_factory=list)
    """A heap of (distance, draw, number, row)."""
    chance: list[Any] = field(default_factory=list)
    """A heap of (draw, number, row)."""

    def add(self, number: int, row: Row) -> None:
        """Count a row, and keep it if it is among the farthest or the chosen ones."""
        self.counts[_step(row["kind"], row["distance"])] += 1
        draw = hashlib.sha256(f"{row['shard']}/{row['key']}".encode()).hexdigest()
        for heap, entry in ((self.far, (row["distance"], draw, number, row)), (self.chance, (draw, number, row))):
            heapq.heappush(heap, entry)
            if len(heap) > MAX_PAIRS // 2:
                heapq.heappop(heap)

    def rows(self) -> list[Row]:
        """The farthest first, then those by chance; each once."""
        chosen = [entry[-1] for entry in (*sorted(self.far, reverse=True), *self.chance)]
        return list({(row["shard"], row["key"], row["uid"]): row for row in chosen}.values())


def _step(kind: str, distance: float) -> float:
    """A distance as the slider has it: bits, or thousandths above it."""
    return float(distance) if kind == "phash" else float(np.ceil(1000 * distance) / 1000)


def render_duplicates(folder: StoragePath, fetch: bool = False) -> str:
    """The page as HTML; `fetch` allows to read shards that the run's plan names on other machines.

    Raises:
        RunError: no finished deduplication, or shards that lie elsewhere.
    """
    run = Run.load(folder)
    record = documents.read_json(folder / "summary.json", documents.PLAN_BYTES)
    summary = check(Deduplicated, record, folder / "summary.json", "deduplication")
    plan = check(Deduplicating, run.plan, folder / "plan.json", "deduplication")
    kinds: dict[str, _Kind] = {near.kind: _Kind() for near in plan.by}
    number = 0
    for name in sorted(listing(folder / FOLDER)):
        for row in duplicates.read(folder / FOLDER / name).to_pylist():
            number += 1
            if row["kind"] in kinds:
                kinds[row["kind"]].add(number, row)
    pairs = _of_few_shards(row for kind in kinds.values() for row in kind.rows())
    specs = inputs.input_shards(folder, run.plan)
    inputs.check_reachable(folder, specs, fetch)
    images = list(dict.fromkeys(end for row in pairs for end in _ends(row)))
    pictures = thumbnails(shards.by_name(shards.expand(specs)), set(images))
    places = {image: place for place, image in enumerate(images)}
    tree = {
        "name": printable(folder.absolute().name),
        "review": False,
        "images": [(printable("/".join(image)), pictures.get(image)) for image in images],
        "kinds": [(name, sorted(kind.counts.items())) for name, kind in kinds.items()],
        "pairs": [
            (*(places[end] for end in _ends(row)), list(kinds).index(row["kind"]), _step(row["kind"], row["distance"]))
            for row in pairs
        ],
    }
    counts = {name: sum(kind.counts.values()) for name, kind in kinds.items()}
    return fill(
        "duplicates.html.j2",
        SCRIPTS,
        tree,
        [f"{len(pairs):,} of {number:,} pairs are in this page."],
        name=tree["name"],
        command=printable(f"--by {','.join(map(str, plan.by))} --keep {plan.keep} --scope {plan.scope}", MAX_MESSAGE),
        tiles=_tiles(summary),
        by=_table("by", "pictures that go", counts),
        sizes=_table("pictures of a group", "groups", summary.groups.sizes),
        kinds=[(str(place), name) for place, name in enumerate(counts) if name != "sha256" and counts[name]],
    )


def _table(first: str, second: str, counts: Mapping[str, int]) -> tuple[list[str], list[list[Cell]]]:
    return [first, second], [[Cell(printable(name)), Cell(f"{count:,}")] for name, count in counts.items()]


def _ends(row: Row) -> tuple[ImageId, ImageId]:
    return (row["shard"], row["key"]), (row["representative_shard"], row["representative_key"])


def _of_few_shards(rows: Iterable[Row]) -> list[Row]:
    """The rows, in order, whose pictures lie in the first shards that are met."""
    known: set[str] = set()
    chosen = []
    for row in rows:
        both = {shard for shard, _ in _ends(row)}
        if row["kind"] != "sha256" and len(known | both) <= MAX_SHARDS:
            known |= both
            chosen.append(row)
    return chosen


def _tiles(summary: Deduplicated) -> list[tuple[str, str, Cell]]:
    groups = summary.groups
    return [
        ("pictures", "in the pool", Cell(f"{summary.pictures:,}")),
        ("stay", "one of each group, and those without a copy", Cell(f"{summary.kept:,}")),
        ("go", f"{summary.share:.1%} of the pool", Cell(f"{summary.dropped:,}")),
        ("groups", f"the largest has {groups.largest:,} pictures", Cell(f"{groups.count:,}")),
    ]
