"""verify: read every file that a run committed and report what differs from its record.

A rerun trusts a completion by the sizes of its outputs; this reads every byte. `mend` withdraws the completions that do
not match, so that the same command as before does only those shards again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from capfilt.data import shards
from capfilt.errors import ShardError
from capfilt.runs import stage_status
from capfilt.runs.ledger import Completion, Input, Ledger
from capfilt.runs.locking import lock
from capfilt.runs.progress import Progress, StageLine
from capfilt.runs.run import Run
from capfilt.runs.tally import difference
from capfilt.stages import inputs
from capfilt.storage.paths import StoragePath, relative_to

READERS = ("annotate", "select")
"""The stages that read whole shards and record their digests."""


@dataclass(frozen=True)
class Broken:
    """A completion that does not match its files, and why."""

    ledger: Ledger
    shard: str
    why: str


@dataclass
class Checked:
    """Counts of what was read."""

    shards: int = 0
    files: int = 0
    bytes: int = 0
    members: dict[str, Counter[str]] = field(default_factory=dict)
    """By stage, how it counted the tar members of the shards that it read."""
    undone: int = 0
    """Shards that were planned and are not done yet, which is no fault."""


def run(
    folder: StoragePath, mend: bool, show: Progress, read_inputs: bool = False, fetch: bool = False
) -> dict[str, Any]:
    """The verb: check every ledger of a run; with `mend` no process may work on the run.

    `read_inputs` also compares the input shards with what the run read, those on other machines only with `fetch`.
    """
    opened = Run.load(folder)
    specs = inputs.input_shards(folder, opened.plan) if read_inputs else []
    inputs.check_reachable(folder, specs, fetch)
    if mend:
        lock.acquire_once(folder)
    checked, broken = Checked(), []
    ledgers = stage_status.find_ledgers(folder)
    with show.stage("verify", sum(len(ledger.files()) for ledger in ledgers)) as line:
        line.start_clock()
        for ledger in ledgers:
            broken += list(check(ledger, checked, line))
    broken += list(check_balance(ledgers))
    if mend:
        for piece in broken:
            piece.ledger.invalidate(piece.shard)
    records = [
        {"stage": b.ledger.stage, "folder": str(relative_to(b.ledger.folder, folder)), "shard": b.shard, "why": b.why}
        for b in broken
    ]
    withdrawn = len({(piece.ledger.path, piece.shard) for piece in broken}) if mend else 0
    members = {stage: dict(counted) for stage, counted in checked.members.items() if counted}
    result = {"run": str(folder), **vars(checked), "members": members, "broken": records, "withdrawn": withdrawn}
    return result | ({"inputs": compare_inputs(opened.plan, specs, ledgers, show)} if read_inputs else {})


def check(ledger: Ledger, checked: Checked, line: StageLine) -> Iterator[Broken]:
    """The completions of one ledger that do not match their files; adds to the counts of `checked`."""
    plan, identities = stage_status.read_plan(ledger)
    current = 0
    for path in ledger.files():
        done = ledger.read(path)
        why = "its completion cannot be read" if done is None else doubt(ledger, done, path.stem)
        if why:
            yield Broken(ledger, path.stem, why)
        elif done is not None:
            current += not identities or identities.get(done.shard) == done.fingerprint
            checked.members.setdefault(ledger.stage, Counter()).update(done.tally.members)
            checked.files += len(done.outputs)
            checked.bytes += sum(output.bytes for output in done.outputs)
        checked.shards += 1
        line.update(line.done + 1)
    if plan is not None and plan.unit == "shards":
        checked.undone += max(0, plan.total - current)


def doubt(ledger: Ledger, done: Completion, shard: str) -> str:
    """Why a completion does not match its files, or ""."""
    if done.shard != shard:
        return f"its completion is that of shard {done.shard}"
    return done.tally.imbalance() or ledger.find_damage(done, hashes=True)


def check_balance(ledgers: list[Ledger]) -> Iterator[Broken]:
    """The selected shards whose counts do not add up to those of their annotations."""
    by_stage = {(ledger.folder, ledger.stage): ledger for ledger in ledgers}
    for (folder, stage), selected in by_stage.items():
        annotated = by_stage.get((folder, "annotate"))
        if stage != "select" or annotated is None:
            continue
        before = {done.shard: done for done in annotated.readable_completions()}
        for done in selected.readable_completions():
            if done.shard in before and (why := difference(before[done.shard].tally, done.tally)):
                yield Broken(selected, done.shard, why)


def compare_inputs(plan: Mapping[str, Any], specs: list[str], ledgers: list[Ledger], show: Progress) -> dict[str, Any]:
    """Compare the shards that a run read with what it recorded of them: the numbers of those compared and of those
    without a record, and which differ."""
    recorded = [
        (ledger, done) for ledger in ledgers for done in ledger.readable_completions() if ledger.stage in READERS
    ]
    urls = inputs.urls_by_name(plan, _addresses(specs)) if recorded else {}
    now: dict[str, Input | str] = {}
    changed, compared = [], 0
    with show.stage("verify inputs", len(recorded)) as line:
        line.start_clock()
        for ledger, done in recorded:
            if done.input is not None:
                compared += 1
                if done.shard not in now:
                    now[done.shard] = _now(urls.get(done.shard))
                if why := differs(done.input, now[done.shard]):
                    changed.append({"stage": ledger.stage, "shard": done.shard, "why": why})
            line.update(line.done + 1)
    return {"compared": compared, "unrecorded": len(recorded) - compared, "changed": changed}


def differs(read: Input, now: Input | str) -> str:
    """How a shard differs from what was read of it, or ""."""
    if isinstance(now, str):
        return now
    if now.bytes != read.bytes:
        return f"it has {now.bytes} bytes, {read.bytes} were read"
    return "" if inputs.same_bytes(read, now) else "it does not have the bytes that were read"


def _addresses(specs: list[str]) -> list[str]:
    """Every shard that is named; a name that matches none stays as it is, to be reported as missing."""
    urls = []
    for spec in specs:
        try:
            urls += shards.expand(spec)
        except ShardError:
            urls.append(spec)
    return urls


def _now(url: str | None) -> Input | str:
    if url is None:
        return "the run does not name such a shard any more"
    try:
        return shards.read_input(url)
    except ShardError as error:
        return str(error)
