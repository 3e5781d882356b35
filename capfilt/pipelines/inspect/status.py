"""status: how far a run is, from its files alone: no Ray, no lock; while it works and after it died."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from capfilt.runs import lock, stage_status
from capfilt.runs.run import Run
from capfilt.runs.stage_status import Standing
from capfilt.storage.paths import StoragePath, relative_to

WORKING = "working"


def run(folder: StoragePath) -> dict[str, Any]:
    """The verb: every stage that was begun, in the order in which they follow each other, and who drives the run."""
    Run.load(folder)
    # The lock first: a driver that ends while stages are counted was at work, and the next look sees how it ended.
    holder, driver = lock.find(folder), lock.state(folder)
    died = holder if not driver and holder == lock.find(folder) else None
    found = [stage_status.standing(ledger) for ledger in stage_status.find(folder)]
    complete = all(stand.done >= stand.plan.total for stand in found)
    return {
        "run": str(folder),
        "state": state(driver, died, complete),
        "stages": [row(folder, stand) for stand in found],
    }


def follow(folder: StoragePath, every: float) -> Iterator[dict[str, Any]]:
    """Look again each `every` seconds while somebody works on the run; the last look is of how it ended."""
    while (told := run(folder))["state"].startswith(WORKING):
        yield told
        time.sleep(every)
    yield told


def state(driver: str, died: lock.Found | None, complete: bool) -> str:
    """working | died | stopped | done, and by whom. `complete`: whatever was begun is done."""
    if driver:
        return f"{WORKING}: {driver}"
    if died is not None:
        return f"died: {died} is gone; the same command goes on"
    return "done: every stage that was begun" if complete else "stopped: the same command goes on"


def row(folder: StoragePath, stand: Standing) -> dict[str, Any]:
    """One stage; a figure that there is not is absent."""
    told: dict[str, Any] = {
        "stage": stand.ledger.stage,
        "folder": str(relative_to(stand.ledger.folder, folder)),
        "label": stand.plan.label,
        "unit": stand.plan.unit,
        "done": stand.done,
        "total": stand.plan.total,
        "samples": {name: count for name, count in stand.tally.samples.items() if count},
        "failed": dict(stand.tally.failed.most_common()),
        "errors": dict(stand.errors.most_common()),
    }
    if stand.rate is not None:
        told["per_second"] = round(stand.rate, 4)
    if stand.left is not None:
        told["seconds_left"] = round(stand.left)
    return told
