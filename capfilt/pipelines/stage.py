"""How every stage is driven: skip what the ledger has, spread the rest, count what came of it.

A job commits each item itself, where it worked; the driver sees names, fingerprints and tallies only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from capfilt.cluster.session import Session
from capfilt.cluster.spread import Resources, spread
from capfilt.errors import RunError
from capfilt.reports.ledger import Ledger
from capfilt.reports.progress import Progress
from capfilt.reports.tally import Tally


class StageJob(Protocol):
    """A job whose items are committed in a ledger."""

    @property
    def name(self) -> str: ...

    @property
    def out(self) -> Path: ...

    def identity(self, item: str) -> str:
        """The fingerprint of everything that decides the item's outcome."""

    def open(self) -> Callable[[str], str]:
        """Load what is needed; the answer does one item, commits it, and returns a few words for the progress line."""


def run_stage(
    session: Session,
    job: StageJob,
    items: Mapping[str, str],
    resources: Resources,
    show: Progress,
    label: str,
) -> Tally:
    """Bring every item (name -> item) to its commit and add up their tallies.

    Raises RunError naming an item that failed, after all others are done; running again redoes just those.
    """
    ledger = Ledger(job.out, job.name)
    identities = {name: job.identity(item) for name, item in items.items()}
    todo = [items[name] for name, identity in identities.items() if ledger.completion(name, identity) is None]
    failed: dict[str, str] = {}
    done = len(items) - len(todo)
    with show.stage(label, len(items)) as line:
        line.resume(done)
        for end in spread(session, job, todo, resources):
            if end.error is not None:
                failed[end.item] = end.error
            else:
                done += 1
            line.move(done, end.result or "")
    if failed:
        item, error = next(iter(failed.items()))
        which = f"{len(failed)} of {len(items)} failed, first {item}: " if len(items) > 1 else ""
        raise RunError(f"{label}: {which}{error.rstrip('.')}. What is done stays done: the same command goes on here.")
    total = Tally.zero()
    for name, identity in identities.items():
        completion = ledger.completion(name, identity)
        if completion is None:
            raise RunError(f"{label}: {name} was done, but its outputs are not there any more; run again")
        total += completion.tally
    return total


def model_worker(session: Session, gpus: float | None = None) -> Resources:
    """What a worker that holds models gets where no recipe says it: a GPU if there are any, else a core."""
    if gpus is None:
        gpus = 0 if session.local else float(session.fits(0, 1) > 0)
    return Resources(gpus=gpus)


def digests(ledger: Ledger) -> dict[str, str]:
    """The sha256 of every file that a stage committed, by its full path.

    What a run made itself is known by these: a time of writing would change when the run folder is copied, and tars
    of one size are common, since tar rounds up.
    """
    return {
        str(ledger.folder.absolute() / output.path): output.sha256
        for done in ledger.completions()
        for output in done.outputs
    }
