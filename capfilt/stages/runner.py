"""The loop of every stage: skip items that are committed in the ledger, spread the others over workers, add up tallies.

A job commits each item itself, on the machine that did the work; the driver only sees names, fingerprints and tallies.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, Protocol

from pydantic import Field

from capfilt.cluster.session import Session, set_threads
from capfilt.cluster.worker import ItemResult
from capfilt.cluster.worker_pool import Resources, pool_size, run_items
from capfilt.config import Config
from capfilt.errors import RunError, ShortfallError, UsageError
from capfilt.inference.captioners.endpoint import cache as answers
from capfilt.runs import metrics, quarantine, stage_status
from capfilt.runs.forks import FORK
from capfilt.runs.ledger import Completion, Ledger
from capfilt.runs.locking import lock
from capfilt.runs.metrics import ShardReport
from capfilt.runs.progress import Progress
from capfilt.runs.run import Run, check_format
from capfilt.runs.tally import Tally
from capfilt.stages import image_index
from capfilt.stages.bisect import TRIES, Bisection
from capfilt.stages.compute import metered
from capfilt.stages.inputs import changed_shards
from capfilt.storage import write_guard
from capfilt.storage.atomic import sweep
from capfilt.storage.paths import AT_ONCE, StoragePath, map_concurrent
from capfilt.storage.remote_path import RemotePath

BATCH = 20_000
"""Completions that the driver holds at once: each takes 3 KB."""


class StageJob(Protocol):
    """A job whose items are committed in a ledger."""

    @property
    def name(self) -> str: ...

    @property
    def out(self) -> StoragePath: ...

    def identity(self, item: str) -> str:
        """The fingerprint of everything that determines the item's output.

        With `by_content = True` in the job an item is the URL of a shard, and the shard's bytes are not part of the
        fingerprint: the job commits a digest of what it read (`shards.Digest`), and the item counts as done as long as
        the URL holds the same bytes.
        """

    def open(self) -> Callable[[str], str | ShardReport | None]:
        """Load what is needed and return a function that processes one item, commits it, and returns a remark for the
        progress line, if there is one to make, or a `ShardReport` that also says how the time was spent. What the job
        loads is said in `loads`, if it has one: the progress line waits for that.

        With `lists_images = True` in the job its tables have the images of a shard, and are indexed for `explain`.

        With `splittable = True` in the job the function is a `bisect.Splittable`, and a sample that kills its worker
        is found by bisection.
        """


def run_stage(
    session: Session,
    job: StageJob,
    items: Mapping[str, str],
    resources: Resources,
    show: Progress,
    label: str,
) -> Tally:
    """Process every item (name -> item) that is not committed yet; returns the sum of all tallies.

    Raises RunError naming an item that failed, after all others are done; running again redoes only the failed ones.
    """
    ledger = Ledger(job.out, job.name)
    done = _DoneItems(ledger, identities(job, items))
    inputs = items if getattr(job, "by_content", False) else {}
    todo = {items[name]: name for name in done.load(inputs, show, label)}
    if todo:
        plan = stage_status.StagePlan(label, len(items), len(items) - len(todo))
        stage_status.write_plan(ledger, plan, done.identities)
        session.report([metrics.queue_reading(job.name, len(todo))])
        image_index.begin(ledger, list(todo.values()))
    failures: dict[str, str] = {}
    pace = stage_status.PaceFile(ledger, len(items))
    meter = metered(session, job, ledger, resources)
    bisection = Bisection(session, job, ledger, resources, meter)
    with meter, show.stage(label, len(items), unit_of(job)) as line:
        line.resume(done.num, _shown(job, done.total), _first_wait(session, job) if todo else "")
        parallel = pool_size(session, job, resources, len(todo)) if todo else 1
        pending, tries = list(todo), TRIES if bisection.enabled else 3
        while pending:
            to_bisect: list[str] = []
            for end, completion in done.look_up(run_items(session, job, pending, resources, tries, meter), todo):
                write_guard.check_lock(ledger.path)
                name, error, report = todo[end.item], end.error, ShardReport.of(end.result)
                line.start_clock(end.seconds, parallel)
                if end.deaths and bisection.is_worthwhile(end.item):
                    to_bisect.append(end.item)
                    continue
                tally = None if completion is None else done.count(name, completion)
                if tally is not None:
                    pace.add(done.num, done.total)
                    meter.end(1, tally.samples["in"])
                    session.report(metrics.shard_readings(job.name, tally, report, end.seconds))
                else:
                    failures[end.item] = error or f"{name} was done, but its outputs are not there any more"
                    stage_status.record_failure(ledger, name, failures[end.item])
                    session.report([metrics.failure_reading(job.name)])
                session.report([metrics.queue_reading(job.name, len(items) - done.num)])
                line.update(done.num, report.text, _shown(job, done.total))
            for item in to_bisect:
                bisection.run(item, todo[item], done.identities[todo[item]])
            pending = to_bisect
    pace.write(done.num, done.total)
    if todo and not session.local:
        write_guard.check_lock(ledger.path)
        sweep(ledger.folder, finished=True)  # temporary files of workers that were killed while writing
    _raise_failed(label, failures, len(items))
    if getattr(job, "lists_images", False):
        image_index.extend(session, ledger, resources.model_copy(update={"gpus": 0, "limit": 0}), show)
    return done.total


def unit_of(job: StageJob) -> str:
    """What the items of a job are, for its progress line; "" for a job on something else than shards."""
    return getattr(job, "unit", "shards" if getattr(job, "by_content", False) else "")


def _shown(job: StageJob, total: Tally) -> Mapping[str, int]:
    """What became of the samples, for the progress line; a job that only reads them has kept and dropped none."""
    samples = total.samples
    return {"in": samples["in"], "kept": samples["in"]} if getattr(job, "only_reads", False) else samples


def _first_wait(session: Session, job: StageJob) -> str:
    """What is waited for before the first item is done."""
    loads = getattr(job, "loads", "")
    return (
        " and ".join(what for what in ("" if session.local else "workers to start", loads) if what) or "the first one"
    )


def _raise_failed(label: str, failures: Mapping[str, str], total: int) -> None:
    for item, error in failures.items():
        which = f"{len(failures)} of {total} failed, first {item}: " if total > 1 else ""
        raise RunError(f"{label}: {which}{error.rstrip('.')}. What is done stays done: the same command goes on here.")


def identities(job: StageJob, items: Mapping[str, str]) -> dict[str, str]:
    """The fingerprint of every item by its name; items on an object store are asked for concurrently."""
    remote = isinstance(job.out, RemotePath) or any("://" in item for item in items.values())
    return dict(zip(items, map_concurrent(job.identity, items.values(), remote), strict=True))


class _DoneItems:
    """The items of a stage that are done; each completion is read once and its balance checked again."""

    def __init__(self, ledger: Ledger, identities: dict[str, str]):
        self.ledger, self.identities = ledger, identities
        self.num, self.total = 0, Tally.zero()

    def load(self, inputs: Mapping[str, str], show: Progress, label: str) -> list[str]:
        """Count every item that the ledger has as done; returns the names of the others.

        Completions of items whose input (`inputs`: name -> URL) has changed since are withdrawn.
        """
        in_ledger = self.ledger.recorded_shards()
        names = (name for name in self.identities if name in in_ledger)
        all_done: set[str] = set()
        while batch := list(islice(names, BATCH)):
            completions = map_concurrent(self._completion, batch, isinstance(self.ledger.path, RemotePath))
            done = {name: one for name, one in zip(batch, completions, strict=True) if one is not None}
            if inputs:
                for name in changed_shards(self.ledger, done, inputs, show, label):
                    self.ledger.invalidate(name)
                    del done[name]
            for name, completion in done.items():
                self.count(name, completion)
            all_done |= done.keys()
        return [name for name in self.identities if name not in all_done]

    def look_up(
        self, ends: Iterable[ItemResult[Any]], names: Mapping[str, str]
    ) -> Iterator[tuple[ItemResult[Any], Completion | None]]:
        """Each end with what the ledger has of the item, None where it failed or that cannot be trusted.

        On a store several are asked for at once: one after the other, at 50 ms an answer, a driver would follow six
        shards a second. Their ends come in order, some of them with the next one.
        """
        if not isinstance(self.ledger.path, RemotePath):
            yield from ((end, None if end.error is not None else self._completion(names[end.item])) for end in ends)
            return
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="store") as pool:
            asked: deque[tuple[ItemResult[Any], Future[Completion | None] | None]] = deque()
            for end in ends:
                failed = end.error is not None
                asked.append((end, None if failed else pool.submit(self._completion, names[end.item])))
                while asked and (len(asked) > AT_ONCE or asked[0][1] is None or asked[0][1].done()):
                    yield _answered(*asked.popleft())
            yield from (_answered(*each) for each in asked)

    def _completion(self, name: str) -> Completion | None:
        return self.ledger.completion(name, self.identities[name])

    def count(self, name: str, completion: Completion) -> Tally:
        """Count one more item as done; returns its tally."""
        if why := completion.tally.imbalance():
            raise RunError(f"{self.ledger.stage}, shard {name}: {why}. `capfilt verify --mend` has it done again.")
        self.num += 1
        self.total += completion.tally
        return completion.tally


def _answered(
    end: ItemResult[Any], completion: Future[Completion | None] | None
) -> tuple[ItemResult[Any], Completion | None]:
    return end, None if completion is None else completion.result()


def withdraw_failed(out: StoragePath, stage: str, what: str) -> int:
    """Withdraw the completions of a stage's shards in which samples or captions failed, so that it does them again.

    Returns how many; the other shards are not touched. A kill between this and the stage changes nothing. Samples that
    were skipped because they killed their worker are tried again, and an endpoint is asked again for what it did not
    write. `what` is the value of --retry; UsageError unless it
    is "failed".
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
    lock.acquire_once(out)
    again = [
        (ledger, done.shard)
        for ledger in stage_status.find_ledgers(out)
        for done in ledger.readable_completions()
        if ledger.stage == stage and done.tally.has_failures
    ]
    for ledger, shard in again:
        quarantine.clear(ledger, shard)
        answers.forget_failures(ledger.folder, shard)
        ledger.invalidate(shard)
    return len(again)


class CommandOptions(Config):
    """Options of one command that do not change what is written; none of them is recorded in the run folder."""

    workers: int = Field(default=0, ge=0)
    """Number of workers; 0 = as many as fit."""
    cpus: float | None = Field(default=None, gt=0)
    """CPUs of each worker; None = 1, or with a local session all that this process may use."""
    gpus: float | None = Field(default=0, ge=0)
    """GPUs of each worker; None = 1 if the cluster has any."""
    limit: float = Field(default=0, ge=0)
    """Seconds that an item may take; 0 = no limit."""
    min_success: float = Field(default=0, ge=0, le=1)
    """The share of samples that must succeed; at least one must in any case."""

    def resources(self, session: Session) -> Resources:
        """The resources of each worker in a session. UsageError for several workers in a local session."""
        if session.local and self.workers > 1:
            raise UsageError(
                f"--workers {self.workers}: --address local is this process alone; leave one of them out, or take"
                " --address start."
            )
        if session.local and self.cpus is not None:
            set_threads(max(1, int(self.cpus)))
        gpus = self.gpus
        if gpus is None:
            gpus = 0 if session.local else float(session.capacity(0, 1) > 0)
        return Resources(cpus=self.cpus or 1, gpus=gpus, workers=self.workers, limit=self.limit)


def check_success(label: str, tally: Tally, least: float = 0, result: Mapping[str, Any] | None = None) -> None:
    """Raise ShortfallError, naming the most common reason, if no sample succeeded or fewer than a share of `least`.

    `result` is what the command prints in that case too.
    """
    total, failed = tally.samples["in"], tally.samples["failed"]
    succeeded = total - failed
    if succeeded and succeeded >= least * total:
        return
    if not total:
        raise ShortfallError(
            f"{label}: no sample came in. Give tars of images with their texts (KEY.jpg and KEY.txt, side by side).",
            result,
        )
    reason, count = max(tally.failed.items(), key=lambda each: each[1])
    wanted = f", and --min-success asks for {least:.2%}" if succeeded else ""
    raise ShortfallError(
        f"{label}: {succeeded} of {total} samples succeeded{wanted}; {count} failed by: {reason}. What is committed"
        " stays. `capfilt explain RUN KEY` says more of each; give other shards, or mend these and run again.",
        result,
    )


def digests(ledger: Ledger) -> dict[str, str]:
    """The sha256 of every file that a stage committed, by its full path.

    They identify the shards that a run wrote itself: the time of writing would change when the run folder is copied,
    and the size is not enough, since tar rounds it up.
    """
    return {
        str(ledger.folder.absolute() / output.path): output.sha256
        for done in ledger.completions()
        for output in done.outputs
    }
