"""verify: read again everything that a run committed, and say what does not hold.

A rerun trusts a completion by the sizes of its outputs; this reads every byte. `mend` withdraws the completions that
do not hold, so that the same command as before does just those pieces again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from capfilt.reports import lock, stages
from capfilt.reports.balance import between
from capfilt.reports.ledger import Completion, Ledger
from capfilt.reports.places import Place, within
from capfilt.reports.progress import Line, Progress
from capfilt.reports.run import Run


@dataclass(frozen=True)
class Broken:
    """A piece of work whose record does not hold, and why."""

    ledger: Ledger
    shard: str
    why: str


@dataclass
class Checked:
    """What was read."""

    shards: int = 0
    files: int = 0
    bytes: int = 0
    undone: int = 0
    """Shards that were planned and are not done; the run is not over, and nothing is wrong with that."""


def run(folder: Place, mend: bool, show: Progress) -> dict[str, Any]:
    """The verb: check every ledger of a run; `mend` needs the run to be at rest."""
    Run.load(folder)
    if mend:
        lock.hold(folder)
    checked, broken = Checked(), []
    ledgers = stages.find(folder)
    with show.stage("verify", sum(len(ledger.files()) for ledger in ledgers)) as line:
        for ledger in ledgers:
            broken += list(check(ledger, checked, line))
    broken += list(lost(ledgers))
    if mend:
        for piece in broken:
            piece.ledger.withdraw(piece.shard)
    told = [
        {"stage": b.ledger.stage, "folder": str(within(b.ledger.folder, folder)), "shard": b.shard, "why": b.why}
        for b in broken
    ]
    withdrawn = len({(piece.ledger.path, piece.shard) for piece in broken}) if mend else 0
    return {"run": str(folder), **vars(checked), "broken": told, "withdrawn": withdrawn}


def check(ledger: Ledger, checked: Checked, line: Line) -> Iterator[Broken]:
    """What does not hold in one ledger."""
    plan, identities = stages.planned(ledger)
    current = 0
    for path in ledger.files():
        done = ledger.read(path)
        why = "its completion cannot be read" if done is None else doubt(ledger, done, path.stem)
        if why:
            yield Broken(ledger, path.stem, why)
        elif done is not None:
            current += not identities or identities.get(done.shard) == done.fingerprint
            checked.files += len(done.outputs)
            checked.bytes += sum(output.bytes for output in done.outputs)
        checked.shards += 1
        line.move(line.done + 1)
    if plan is not None and plan.unit == "shards":
        checked.undone += max(0, plan.total - current)


def doubt(ledger: Ledger, done: Completion, shard: str) -> str:
    """Say why a completion does not hold, or ""."""
    if done.shard != shard:
        return f"its completion is that of shard {done.shard}"
    return done.tally.imbalance() or ledger.doubt(done, hashes=True)


def lost(ledgers: list[Ledger]) -> Iterator[Broken]:
    """What got lost between the annotations of a folder and their verdicts."""
    found = {(ledger.folder, ledger.stage): ledger for ledger in ledgers}
    for (folder, stage), selected in found.items():
        annotated = found.get((folder, "annotate"))
        if stage != "select" or annotated is None:
            continue
        before = {done.shard: done for done in stages.readable(annotated)}
        for done in stages.readable(selected):
            if done.shard in before and (why := between(before[done.shard], done)):
                yield Broken(selected, done.shard, why)
