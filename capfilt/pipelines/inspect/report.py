"""report: write a run folder, or two side by side, as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from capfilt.data.duplicates import STAGE
from capfilt.reporting.collect import PAGE, collect_report
from capfilt.reporting.comparison.collect import collect_comparison
from capfilt.reporting.comparison.page import render_comparison
from capfilt.reporting.near.duplicates import render_duplicates
from capfilt.reporting.page import render
from capfilt.runs.cost import Price
from capfilt.runs.run import verb_of
from capfilt.storage.atomic import atomic
from capfilt.storage.paths import StoragePath

COMPARISON = "comparison.html"


def run(
    folder: StoragePath,
    out: StoragePath | None = None,
    fetch: bool = False,
    web: Sequence[str] | None = None,
    heatmaps: int = 0,
    filter_: str | None = None,
    price: Price | None = None,
) -> dict[str, Any]:
    """The verb: write the page of a run to `out`, else to report.html in the run folder.

    Args:
        fetch: read shards that the run's plan names on other machines, too.
        web: where the shards lie, instead of the plan, which holds no secrets of an address.
        heatmaps: how many kept and how many dropped texts of each round get one; runs the filter that scored them.
        filter_: that filter, where the run folder neither holds nor names it.
        price: with it the page says what each stage costs.
    """
    path = out or folder / PAGE
    if verb_of(folder) == STAGE:
        return _write(path, render_duplicates(folder, fetch), rounds=0, texts=0)
    report = collect_report(folder, fetch, web, price)
    if heatmaps:
        from capfilt.pipelines.inspect.gallery_heatmaps import with_heatmaps  # torch

        report = with_heatmaps(folder, report, heatmaps, filter_, fetch)
    num_texts = sum(len(texts) for texts in report.texts)
    record = _write(path, render(report.page), rounds=len(report.page.rounds), texts=num_texts)
    drawn = sum(len(each.heatmaps) for each in report.page.annotated_rounds)
    return {**record, "heatmaps": drawn} if heatmaps else record


def compare(
    folder: StoragePath, other: StoragePath, out: StoragePath | None = None, fetch: bool = False
) -> dict[str, Any]:
    """The verb with two runs: write the page of both side by side to `out`, else to comparison.html in the first.

    Runs that share no image are compared by their totals alone; the page and `joined` (0) say so.
    """
    comparison = collect_comparison((folder, other), fetch)
    joined = comparison.joined
    texts = sum(len(image.texts) for image in joined.images)
    record = _write(out or folder / COMPARISON, render_comparison(comparison), rounds=0, texts=texts)
    return {**record, "joined": len(joined.images)}


def _write(path: StoragePath, html: str, **counts: int) -> dict[str, Any]:
    page = html.encode("utf-8", "replace")
    with atomic(path) as file:
        file.write(page)
    return {"report": str(path), "bytes": len(page), **counts}
