"""report: write a run folder as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from capfilt.reporting.collect import PAGE, collect_report
from capfilt.reporting.page import render
from capfilt.storage.atomic import atomic
from capfilt.storage.paths import StoragePath


def run(
    folder: StoragePath, out: StoragePath | None = None, fetch: bool = False, web: Sequence[str] | None = None
) -> dict[str, Any]:
    """The verb: write the page of a run to `out`, else to report.html in the run folder.

    `fetch` allows to read shards that the run's plan names on other machines; `web` says where the shards lie, instead
    of the plan, which holds no secrets of an address.
    """
    path = out or folder / PAGE
    report = collect_report(folder, fetch, web)
    page = render(report.page).encode("utf-8", "replace")
    with atomic(path) as file:
        file.write(page)
    num_texts = sum(len(texts) for texts in report.texts)
    return {"report": str(path), "bytes": len(page), "rounds": len(report.page.rounds), "texts": num_texts}
