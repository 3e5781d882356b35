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
        line.move(done, "resumed" if done else "")
        for end in spread(session, job, todo, resources):
            if end.error is not None:
                failed[end.item] = end.error
            else:
                done += 1
            line.move(done, end.result or "")
    if failed:
        item, error = next(iter(failed.items()))
        raise RunError(
            f"{label}: {len(failed)} of {len(items)} failed, first {item}: {error}. "
            "Run the same command again to redo these alone."
        )
    total = Tally.zero()
    for name, identity in identities.items():
        completion = ledger.completion(name, identity)
        if completion is None:
            raise RunError(f"{label}: {name} was done, but its outputs are not there any more; run again")
        total += completion.tally
    return total
