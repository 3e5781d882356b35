"""Renders the page of two runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from capfilt.data.policy import failure_class
from capfilt.data.sample import SOURCES
from capfilt.evaluation.known_truth import Truth
from capfilt.printable import MAX_MESSAGE, printable
from capfilt.reporting.comparison import tables
from capfilt.reporting.comparison.collect import Comparison
from capfilt.reporting.comparison.join import ABSENT, Decided, Joined
from capfilt.reporting.page import fill
from capfilt.reporting.page_data import MAX_LINES
from capfilt.reporting.sampling import MAX_TEXT
from capfilt.runs.tally import MAX_REASONS, OTHER

SCRIPTS = ("dom.js", "viewer.js", "csv.js", "compare.js")
COLUMNS = (
    "image",
    "source",
    "text",
    "length",
    "truth",
    *(f"{name}{side}" for side in "AB" for name in ("itm", "itc", "verdict", "why")),
)
"""The columns of the joined texts in the page. image, source and why are positions in lists, -1 for none; length is the
number of characters of the whole text, truth as in the page of one run, verdict as in `join`."""


def render_comparison(comparison: Comparison) -> str:
    joined, sides = comparison.joined, comparison.sides
    names = [printable(side.name) for side in sides]
    reasons: dict[str, int] = {}
    rows = _columns(joined, sides[0].truths, reasons)
    images = [(printable(image.first.id[1]), comparison.thumbnails.get(image.first.uid)) for image in joined.images]
    tree = {
        "name": f"{names[0]}-{names[1]}",
        "review": False,
        "sides": [{"name": name, "decided": side.annotated.decided} for name, side in zip(names, sides, strict=True)],
        "images": images,
        "identities": [(printable(image.first.id[0]), printable(image.first.uid)) for image in joined.images],
        "reasons": list(reasons),
        "rows": rows,
    }
    return fill(
        "compare.html.j2",
        SCRIPTS,
        tree,
        [printable(note, MAX_MESSAGE) for note in comparison.notes[:MAX_LINES]],
        names=names,
        commands=[printable(side.record.command) for side in sides],
        shared=bool(joined.images),
        whole=joined.whole,
        tiles=list(tables.tiles(comparison)),
        totals=tables.totals(sides),
        settings=tables.settings(sides),
        verdicts=tables.verdicts(joined),
        scores=tables.scores(joined),
        charts=list(tables.score_charts(sides, joined)),
        truth=any(value >= 0 for value in rows["truth"]),
    )


def _columns(joined: Joined, truths: Mapping[str, Truth], reasons: dict[str, int]) -> dict[str, list[Any]]:
    """The joined texts by column; fills `reasons`, the list into which `why` points."""
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    for number, image in enumerate(joined.images):
        for text in image.texts:
            present = next(side for side in text.sides if side is not None)
            known = truths.get(image.first.uid) if text.source == "web" and present.row.candidate == 0 else None
            values = (
                number,
                SOURCES.index(text.source),
                text.text[:MAX_TEXT],
                len(text.text),
                -1 if known is None else int(known[0]),
                *_side_values(text.sides[0], reasons),
                *_side_values(text.sides[1], reasons),
            )
            for name, value in zip(COLUMNS, values, strict=True):
                columns[name].append(value)
    return columns


def _side_values(side: Decided | None, reasons: dict[str, int]) -> Sequence[Any]:
    if side is None:
        return None, None, ABSENT, -1
    scores = [None if value is None else float(f"{value:.9g}") for value in (side.row.itm, side.row.itc)]
    name = printable(failure_class(side.reason))
    name = name if name in reasons or len(reasons) < MAX_REASONS else OTHER
    return *scores, side.verdict, reasons.setdefault(name, len(reasons)) if side.reason else -1
