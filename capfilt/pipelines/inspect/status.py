"""status: the progress of a run, read from its files alone, without Ray and without a lock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from capfilt.runs import stage_status
from capfilt.runs.cost import Price, run_cost, stage_figures
from capfilt.runs.locking.lock_file import LockFile, driver_of, find_lock
from capfilt.runs.run import Run, check_is_run
from capfilt.runs.stage_status import StageStatus
from capfilt.storage.paths import StoragePath, relative_to

WORKING = "working"


def run(folder: StoragePath, price: Price | None = None, again: bool = False) -> dict[str, Any]:
    """The verb: every stage that was begun, in order, and whether a process works on the run; with a price also what
    they cost. `again`: the folder was looked through for links a moment ago; a large one has millions of files."""
    if again:
        check_is_run(folder)
    else:
        Run.load(folder)
    # The lock first: if a driver ends while stages are counted, the run still counts as working, until the next call.
    holder, driver = find_lock(folder), driver_of(folder)
    died = holder if not driver and holder == find_lock(folder) else None
    standings = [stage_status.read_status(ledger) for ledger in stage_status.find_ledgers(folder)]
    complete = all(stand.done >= stand.plan.total for stand in standings)
    return {
        "run": str(folder),
        "state": state(driver, died, complete),
        "stages": [stage_record(folder, stand, price) for stand in standings],
        **({} if price is None else {"cost": run_cost(standings, price)}),
    }


def follow(folder: StoragePath, every: float, price: Price | None = None) -> Iterator[dict[str, Any]]:
    """Yield the status every `every` seconds while a process works on the run, and once more after it has ended."""
    status = run(folder, price)
    while status["state"].startswith(WORKING):
        yield status
        time.sleep(every)
        status = run(folder, price, again=True)
    yield status


def state(driver: str, died: LockFile | None, complete: bool) -> str:
    """The state of a run in words: working | died | stopped | done, and which process.

    `driver` is the process that holds the lock ("" for none), `died` the holder of a lock whose process is gone,
    `complete` whether every stage that was begun is done.
    """
    if driver:
        return f"{WORKING}: {driver}"
    if died is not None:
        return f"died: {died} is gone; the same command goes on"
    return "done: every stage that was begun" if complete else "stopped: the same command goes on"


def stage_record(folder: StoragePath, stand: StageStatus, price: Price | None = None) -> dict[str, Any]:
    """One stage as --json prints it; a figure that is not known is absent."""
    record: dict[str, Any] = {
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
        record["per_second"] = round(stand.rate, 4)
    if stand.seconds_left is not None:
        record["seconds_left"] = round(stand.seconds_left)
    return record | stage_figures(stand, price)
