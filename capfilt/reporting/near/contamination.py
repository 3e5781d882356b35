"""What a page says of a decontamination: what was found in each held-out set, what would have been, and examples.

It reads the record and the table that `capfilt decontaminate` wrote; a run folder may come from someone else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from capfilt.printable import MAX_MESSAGE, printable
from capfilt.reporting.near.records import Decontaminated, HeldOutSet, Tested, check
from capfilt.reporting.page_data import MAX_LINES, Contamination, Table
from capfilt.reporting.sections import Cell
from capfilt.stages.near.decontaminate import compare, rows
from capfilt.storage import documents
from capfilt.storage.paths import StoragePath

MAX_EXAMPLES = 50


def read(folder: StoragePath) -> Contamination | None:
    """What a folder's decontamination says; None where there was none, or it has not ended.

    RunError for a record that is none.
    """
    path = folder / "summary.json"
    if not path.is_file():
        return None
    record = documents.read_object(path)
    known = check(Decontaminated, record, path, "decontamination")
    suspects = rows.read(folder / rows.TABLE) if (folder / rows.TABLE).is_file() else iter(())
    return Contamination(
        verdict=printable(compare.verdict_line(record), MAX_MESSAGE),
        sets=_sets(known.sets),
        tests=_tests(known.self_test),
        examples=_examples(islice(suspects, MAX_EXAMPLES)),
    )


def _sets(sets: Mapping[str, HeldOutSet]) -> Table:
    kinds = list(dict.fromkeys(kind for each in sets.values() for kind in each.samples))[:MAX_LINES]
    headings = ["held-out set", "pictures", "in the pool", *(f"samples by {printable(kind)}" for kind in kinds)]
    lines = []
    for name, each in islice(sets.items(), MAX_LINES):
        counts = [each.pictures, each.in_pool, *(each.samples.get(kind, 0) for kind in kinds)]
        lines.append(_row(name, *(f"{count:,}" for count in counts)))
    return headings, lines


def _tests(tests: Mapping[str, Tested]) -> Table:
    copies = list(dict.fromkeys(copy for test in tests.values() for copy in test.recall))[:MAX_LINES]
    headings = ["by", "pictures", *map(printable, copies), "another one as near"]
    lines = []
    for kind, test in islice(tests.items(), MAX_LINES):
        shares = [*(test.recall.get(copy) for copy in copies), test.confused]
        percents = ("–" if share is None else f"{share:.1%}" for share in shares)
        lines.append(_row(kind, f"{test.pictures:,}", *percents))
    return headings, lines


def _examples(suspects: Iterable[Mapping[str, Any]]) -> Table:
    lines = []
    for each in suspects:
        picture = f"{each['held_out_key']}{', its ' + each['copy'] if each['copy'] else ''}"
        names = (each["key"], each["shard"], picture, each["set"], each["kind"])
        lines.append(_row(*names, f"{each['distance']:.4g}"))
    return ["sample", "shard", "held-out picture", "set", "by", "distance"], lines


def _row(*texts: str) -> list[Cell]:
    return [Cell(printable(text)) for text in texts]
