"""report: write a run folder as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from capfilt.reporting.collect import PAGE, gather
from capfilt.reporting.page import render
from capfilt.storage.atomic import atomic
from capfilt.storage.paths import StoragePath


def run(
    folder: StoragePath, out: StoragePath | None = None, fetch: bool = False, web: Sequence[str] | None = None
) -> dict[str, Any]:
    """The verb: write the page of a run; `out` instead of report.html in the run folder.

    `fetch`: shards that its plan names are fetched from elsewhere, too; `web`: where they lie, for who knows it better
    than the plan, which holds no secrets of an address.
    """
    path = out or folder / PAGE
    gathered = gather(folder, fetch, web)
    page = render(gathered.facts).encode("utf-8", "replace")
    with atomic(path) as file:
        file.write(page)
    texts = sum(len(rows) for rows in gathered.rows)
    return {"report": str(path), "bytes": len(page), "rounds": len(gathered.facts.rounds), "texts": texts}
