"""The balance of a run: in = kept + dropped + failed, for every shard of a stage, and from one stage to the next."""

from __future__ import annotations

from collections.abc import Iterable

from capfilt.errors import RunError
from capfilt.runs.ledger import Completion, Ledger
from capfilt.runs.stage_status import readable


def between(scored: Completion, judged: Completion) -> str:
    """Say what was lost or won between a shard's annotations and their verdicts, or ""."""
    before, after = scored.tally, judged.tally
    if before.samples["in"] != after.samples["in"]:
        return f"{before.samples['in']} samples were annotated, {after.samples['in']} have a verdict"
    if before.samples["failed"] != after.samples["failed"]:
        return f"{before.samples['failed']} samples failed, {after.samples['failed']} of them have a verdict"
    if (came := before.members["in"]) and (went := after.members["in"]) and came != went:
        return f"{came} members of the shard were read for annotations, {went} for verdicts"
    for source in sorted({*before.texts["in"], *after.texts["in"]}):
        came, went = before.texts["in"][source], after.texts["in"][source]
        if came != went:
            return f"{came} {source} texts were annotated, {went} have a verdict"
    return ""


def check(annotated: Ledger, selected: Ledger, shards: Iterable[str]) -> None:
    """Refuse a selection that does not account for everything that was annotated; the error names the shard."""
    wanted = set(shards)
    before = {done.shard: done for done in readable(annotated) if done.shard in wanted}
    for done in readable(selected):
        if done.shard in before and (why := between(before[done.shard], done)):
            raise RunError(f"shard {done.shard}: {why}. Nothing may get lost: run `capfilt verify --mend` on the run.")
