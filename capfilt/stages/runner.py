"""How every stage is driven: skip what the ledger has, spread the rest, count what came of it.

A job commits each item itself, where it worked; the driver sees names, fingerprints and tallies only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from pydantic import Field

from capfilt.cluster.session import Session, set_threads
from capfilt.cluster.worker_pool import Resources, spread
from capfilt.config import Config
from capfilt.errors import RunError, ShortfallError, UsageError
from capfilt.runs import lock, metrics, quarantine, stage_status
from capfilt.runs.forks import FORK
from capfilt.runs.ledger import Completion, Ledger
from capfilt.runs.metrics import ShardReport
from capfilt.runs.progress import Progress
from capfilt.runs.run import Run, check_format
from capfilt.runs.tally import Tally
from capfilt.stages import contents
from capfilt.stages.bisect import TRIES, Bisection
from capfilt.storage import write_guard
from capfilt.storage.atomic import sweep
from capfilt.storage.paths import RemotePath, StoragePath, map_concurrent


class StageJob(Protocol):
    """A job whose items are committed in a ledger."""

    @property
    def name(self) -> str: ...

    @property
    def out(self) -> StoragePath: ...

    def identity(self, item: str) -> str:
        """The fingerprint of everything that decides the item's outcome.

        With `by_content = True` in the job an item is the URL of a shard, and what lies there is no part of it: the
        job commits what it read (`shards.Digest`), and the item is done as long as the same bytes lie there.
        """

    def open(self) -> Callable[[str], str | ShardReport]:
        """Load what is needed; the answer does one item, commits it, and returns a few words for the progress line,
        or a `ShardReport` that also says where the time went.

        With `divisible = True` in the job the answer is a `hunt.Splittable`, and a sample that kills is found.
        """


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
    count = _Count(ledger, identities(job, items))
    inputs = items if getattr(job, "by_content", False) else {}
    todo = {items[name]: name for name in count.missing(inputs, show, label)}
    if todo:
        stage_status.begin(ledger, stage_status.Plan(label, len(items), len(items) - len(todo)), count.identities)
        session.report([metrics.queued(job.name, len(todo))])
    failures: dict[str, str] = {}
    pace = stage_status.Pace(ledger)
    hunt = Bisection(session, job, ledger, resources)
    with show.stage(label, len(items)) as line:
        line.resume(count.num)
        pending = list(todo)
        while pending:
            deadly: list[str] = []
            for end in spread(session, job, pending, resources, TRIES if hunt.divisible else 3):
                write_guard.confirm(ledger.path)
                name, error, told = todo[end.item], end.error, ShardReport.of(end.result)
                if end.deaths and hunt.worthwhile(end.item):
                    deadly.append(end.item)
                    continue
                tally = count.take(name) if error is None else None
                if tally is not None:
                    pace.add()
                    session.report(metrics.of_shard(job.name, tally, told, end.seconds))
                else:
                    failures[end.item] = error or f"{name} was done, but its outputs are not there any more"
                    stage_status.failed(ledger, name, failures[end.item])
                    session.report([metrics.of_failure(job.name)])
                session.report([metrics.queued(job.name, len(items) - count.num)])
                line.move(count.num, told.words)
            for item in deadly:
                hunt.find(item, todo[item], count.identities[todo[item]])
            pending = deadly
    pace.keep()
    if todo and not session.local:
        write_guard.confirm(ledger.path)
        sweep(ledger.folder, over=True)  # a worker that was killed while writing left its file, and others did its work
    _raise_failed(label, failures, len(items))
    return count.total


def _raise_failed(label: str, failures: Mapping[str, str], total: int) -> None:
    for item, error in failures.items():
        which = f"{len(failures)} of {total} failed, first {item}: " if total > 1 else ""
        raise RunError(f"{label}: {which}{error.rstrip('.')}. What is done stays done: the same command goes on here.")


def identities(job: StageJob, items: Mapping[str, str]) -> dict[str, str]:
    """The fingerprint of every item by its name; of those on a store many are asked for at once."""
    remote = isinstance(job.out, RemotePath) or any("://" in item for item in items.values())
    return dict(zip(items, map_concurrent(job.identity, items.values(), remote), strict=True))


class _Count:
    """What is done of a stage, each completion read once, its balance checked again."""

    def __init__(self, ledger: Ledger, identities: dict[str, str]):
        self.ledger, self.identities = ledger, identities
        self.num, self.total = 0, Tally.zero()

    def missing(self, inputs: Mapping[str, str], show: Progress, label: str) -> list[str]:
        """Look for every item, count what is done, and return the others. Those of other `inputs` (name -> URL) than
        they were done from are forgotten.
        """
        there = self.ledger.begun()
        begun = [name for name in self.identities if name in there]
        looked = map_concurrent(self._completion, begun, isinstance(self.ledger.path, RemotePath))
        done = {name: found for name, found in zip(begun, looked, strict=True) if found is not None}
        if inputs:
            for name in contents.changed(self.ledger, done, inputs, show, label):
                self.ledger.withdraw(name)
                del done[name]
        for name, found in done.items():
            self._add(name, found)
        return [name for name in self.identities if name not in done]

    def take(self, name: str) -> Tally | None:
        """Count an item if it is done, and return its tally."""
        return self._add(name, self._completion(name))

    def _completion(self, name: str) -> Completion | None:
        return self.ledger.completion(name, self.identities[name])

    def _add(self, name: str, found: Completion | None) -> Tally | None:
        if found is None:
            return None
        if why := found.tally.imbalance():
            raise RunError(f"{self.ledger.stage}, shard {name}: {why}. `capfilt verify --mend` has it done again.")
        self.num += 1
        self.total += found.tally
        return found.tally


def retry(out: StoragePath, stage: str, what: str) -> int:
    """Have the shards of a stage done again in which samples failed; returns how many. The others are not touched.

    Their completions are withdrawn, so that a kill between this and the stage changes nothing. Samples that were left
    out because they killed their worker are tried again.
    """
    if what != "failed":
        raise UsageError(f"--retry {what}: only failed samples can be retried; write --retry failed.")
    if not (out / "plan.json").is_file():
        if (out / FORK).is_file():
            raise UsageError(
                f"--retry redoes what a run has: begin the fork first, then give --out {out} --retry failed."
            )
        return 0
    check_format(out, Run.load(out).plan)
    lock.hold(out)
    again = [
        (ledger, done.shard)
        for ledger in stage_status.find(out)
        for done in stage_status.readable(ledger)
        if ledger.stage == stage and done.tally.samples["failed"]
    ]
    for ledger, shard in again:
        quarantine.forget(ledger, shard)
        ledger.withdraw(shard)
    return len(again)


class CommandOptions(Config):
    """What is asked of one command; nothing of it decides what is written, and none of it is remembered."""

    workers: int = Field(default=0, ge=0)
    """How many; 0 = as many as fit."""
    cpus: float | None = Field(default=None, gt=0)
    """Of each; None = 1, or in this process alone all that it may use."""
    gpus: float | None = Field(default=0, ge=0)
    """Of each; None = 1 where the cluster has any."""
    limit: float = Field(default=0, ge=0)
    """Seconds that an item may take; 0 = any."""
    min_success: float = Field(default=0, ge=0, le=1)
    """The share of samples that must succeed; one must in any case."""

    def resources(self, session: Session) -> Resources:
        """What is asked of a session. UsageError for several workers in one process."""
        if session.local and self.workers > 1:
            raise UsageError(
                f"--workers {self.workers}: --address local is this process alone; leave one of them out, or take"
                " --address start."
            )
        if session.local and self.cpus is not None:
            set_threads(max(1, int(self.cpus)))
        gpus = self.gpus
        if gpus is None:
            gpus = 0 if session.local else float(session.fits(0, 1) > 0)
        return Resources(cpus=self.cpus or 1, gpus=gpus, workers=self.workers, limit=self.limit)


def check_success(label: str, tally: Tally, least: float = 0, result: Mapping[str, Any] | None = None) -> None:
    """Raise ShortfallError, with the commonest reason, unless a share of at least `least` of the samples succeeded, and
    one in any case. `result` is what the command prints all the same.
    """
    came, failed = tally.samples["in"], tally.samples["failed"]
    good = came - failed
    if good and good >= least * came:
        return
    if not came:
        raise ShortfallError(
            f"{label}: no sample came in. Give tars of images with their texts (KEY.jpg and KEY.txt, side by side).",
            result,
        )
    reason, count = max(tally.failed.items(), key=lambda each: each[1])
    wanted = f", and --min-success asks for {least:.2%}" if good else ""
    raise ShortfallError(
        f"{label}: {good} of {came} samples succeeded{wanted}; {count} failed by: {reason}. What is committed stays."
        " `capfilt explain RUN KEY` says more of each; give other shards, or mend these and run again.",
        result,
    )


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
