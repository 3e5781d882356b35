"""A billion pairs on a thousand workers, simulated: planning and ledger are the real code, clock and store are not.

    python benchmarks/simulation.py --shards 100000 --workers 1000

`run_stage`, `Run.open`, the ledger, the lock and every byte of their records are the real ones. Simulated are the clock
of the stage, the workers (each takes a time drawn for each shard, and is preempted now and then) and the store: a
file system of fsspec in memory that answers after `--answer` seconds of the simulated clock, at most so many requests a
second for each prefix (S3: 5,500 reads and 3,500 writes), and counts. The driver's requests from the main thread are
answered one after the other, those of `map_concurrent` and `look_up` 32 at a time. What a worker reads of a tar is
counted in blocks of 5 MiB and not made. Printed is Markdown: figures of the simulation, not of a run.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import fsspec
from simulated_store import CLOCK, SlowStore

from capfilt.cluster.session import connect
from capfilt.cluster.worker import ItemResult
from capfilt.cluster.worker_pool import ITEMS_PER_WORKER, Resources
from capfilt.config import Config
from capfilt.runs import stage_status, usage
from capfilt.runs.ledger import Input, Ledger, fingerprint
from capfilt.runs.locking import lock
from capfilt.runs.progress import Progress
from capfilt.runs.run import Run
from capfilt.runs.tally import Tally
from capfilt.stages import runner
from capfilt.storage import write_guard
from capfilt.storage.atomic import atomic
from capfilt.storage.paths import StoragePath
from capfilt.storage.remote_path import RemotePath

USD = {"read": 0.4e-6, "write": 5e-6, "list": 5e-6}
"""Of a request: Amazon S3 Standard, us-east-1."""
BLOCK_BYTES = 5 * 2**20
"""What fsspec reads at once."""


# ---- the work ----


class SimulatedJob(Config):
    """A stage whose workers read a tar, write a table (and a tar) and commit, on the store."""

    out: StoragePath
    stage: str
    images: int
    outputs: int

    @property
    def name(self) -> str:
        return self.stage

    def identity(self, item: str) -> str:
        return fingerprint(self.stage, self.images, item)

    def open(self) -> Any:
        raise AssertionError("its workers are simulated")

    def commit(self, shard: str) -> None:
        """What a worker writes of a shard: small objects in the place of outputs, and the real completion."""
        paths = [self.out / f"{self.stage}-{kind}/{shard}.parquet" for kind in range(self.outputs)]
        for path in paths:
            with atomic(path) as file:
                file.write(b"x")
        tally = Tally(
            samples=Counter({"in": self.images, "kept": self.images}),
            texts={
                "in": Counter(web=self.images, synthetic=self.images),
                "kept": Counter(web=self.images, synthetic=self.images - 7),
                "dropped": Counter({"synthetic: itm below threshold": 7}),
            },
            members=Counter({"in": 3 * self.images, "used": 3 * self.images}),
        )
        Ledger(self.out, self.stage).commit(shard, self.identity(shard), paths, tally, Input(1, "c" * 64, "e"))


@dataclass
class Cloud:
    """Workers that are preempted and come back."""

    workers: int
    seconds: float
    """Of a shard, on average, beside what its worker waits for the store; the spread is a quarter."""
    tar_bytes: int
    life: float
    """Seconds from one preemption of a worker to the next, on average."""
    away: float = 180.0
    """Seconds until another one is there."""
    seed: int = 0
    lost: float = 0.0
    """Seconds of work on shards that had to be done again."""
    preempted: int = 0
    worked: float = 0.0
    idle: float = 0.0
    cpu: float = 0.0
    """Seconds of this process that workers would have computed."""
    ends: list[float] = field(default_factory=list)

    def run_items(self, _session: Any, job: SimulatedJob, items: list[str], *_: Any) -> Iterator[ItemResult[str]]:
        """In place of the pool of Ray actors: the same queue of two items a worker, in simulated time."""
        rng, order = random.Random(self.seed), itertools.count()
        waiting = list(reversed(items))
        queues: list[list[tuple[str, float]]] = [[] for _ in range(self.workers)]
        free = [CLOCK.now] * self.workers
        gone = [CLOCK.now + rng.expovariate(1 / self.life) for _ in range(self.workers)]
        events: list[tuple[float, int, int]] = []

        def give(worker: int) -> None:
            while waiting and len(queues[worker]) < ITEMS_PER_WORKER:
                queues[worker].append((waiting.pop(), CLOCK.now))

        def start(worker: int) -> None:
            """Work on the first item in the queue until it is done or the worker is gone."""
            if not queues[worker]:
                return
            item, known = queues[worker][0]
            begun = max(free[worker], known)
            self.idle += begun - free[worker]
            seconds = self.seconds * rng.lognormvariate(-0.03, 0.25) + self._store_seconds(job, item)
            while begun + seconds > gone[worker]:  # the work on it is lost, and begins again elsewhere
                self.lost += max(0.0, gone[worker] - begun)
                self.preempted += 1
                begun = max(begun, gone[worker]) + self.away
                gone[worker] = begun + rng.expovariate(1 / self.life)
            self.worked += seconds
            heapq.heappush(events, (begun + seconds, next(order), worker))

        for worker in range(self.workers):
            give(worker)
            start(worker)
        while events:
            end, _, worker = heapq.heappop(events)
            CLOCK.now = max(CLOCK.now, end)
            item, _ = queues[worker].pop(0)
            free[worker] = end
            self._commit(job, item)
            self.ends.append(end)
            yield ItemResult(item, "")
            give(worker)
            start(worker)

    def _store_seconds(self, job: SimulatedJob, item: str) -> float:
        """What a worker waits for while it reads a tar."""
        blocks = -(-self.tar_bytes // BLOCK_BYTES)
        SlowStore.counts["worker", "read"] += 1 + blocks
        return (1 + blocks) * SlowStore.answer

    def _commit(self, job: SimulatedJob, item: str) -> None:
        began = time.process_time()
        SlowStore.working, SlowStore.spent = True, 0.0
        checked = dict(write_guard._guards)  # another process has not checked the lock lately
        write_guard._guards.update(dict.fromkeys(checked, float("-inf")))
        job.commit(item)
        write_guard._guards.update(checked)
        SlowStore.working = False
        self.cpu += time.process_time() - began


# ---- the run ----


@dataclass
class Row:
    """What a step took."""

    name: str
    hours: float
    cpu: float
    per_shard: Mapping[str, float]
    usd: float
    notes: str


def simulate(words: argparse.Namespace) -> tuple[list[Row], list[str]]:
    fsspec.register_implementation("slow", SlowStore, clobber=True)
    simulated = SimpleNamespace(monotonic=lambda: CLOCK.now, time=time.time)
    for module in (write_guard, stage_status, usage):  # how often they write is a matter of time
        module.time = simulated  # type: ignore[attr-defined]
    SlowStore.answer = words.answer
    out, rows = RemotePath("slow://bucket/run"), list[Row]()
    names = [f"{i:07d}" for i in range(words.shards)]
    rate = {"annotate": words.annotate_rate, "select": words.select_rate}
    measured = Measured(words.shards)
    Run.open(out, "", {"verb": "annotate", "shards": [f"slow://bucket/web/{name}.tar" for name in names]})
    rows.append(measured.row("open the run", ""))
    clouds = {}
    with connect("local") as session:
        for stage, outputs in (("annotate", 1), ("select", 2)):
            seconds = words.images / rate[stage]
            cloud = Cloud(words.workers, seconds, words.images * words.image_bytes, words.life * 3600)
            runner.run_items = cloud.run_items  # type: ignore[assignment]
            job = SimulatedJob(out=out, stage=stage, images=words.images, outputs=outputs)
            items = dict(zip(names, names, strict=True))
            runner.run_stage(session, job, items, Resources(), Progress(quiet=True), stage)
            ideal = cloud.worked / cloud.workers
            notes = (
                f"{cloud.preempted:,} preemptions, {cloud.lost / 3600:,.0f} worker-hours of work lost"
                f" ({cloud.lost / (cloud.worked + cloud.lost):.1%}), workers idle {cloud.idle / cloud.worked:.1%};"
                f" {ideal / 3600:.2f} h without both"
            )
            rows.append(measured.row(stage, notes, cloud.cpu))
            clouds[stage] = cloud
            runner.run_stage(session, job, items, Resources(), Progress(quiet=True), stage)
            rows.append(measured.row(f"{stage} again, all of it done", ""))
    lock.release_all()
    return rows, measured.memory()


class Measured:
    """Takes the difference of clocks and counts from step to step."""

    def __init__(self, shards: int) -> None:
        self.shards = shards
        self.base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self._take()

    def _take(self) -> None:
        self.now, self.cpu, self.counts = CLOCK.now, time.process_time(), Counter(SlowStore.counts)
        self.busy = CLOCK.busy

    def row(self, name: str, notes: str, workers_cpu: float = 0.0) -> Row:
        counts = Counter(SlowStore.counts)
        counts.subtract(self.counts)
        per_shard = {f"{who} {kind}": count / self.shards for (who, kind), count in sorted(counts.items()) if count}
        usd = sum(USD[kind] * count for (_, kind), count in counts.items())
        waits = f"the driver waited {(CLOCK.busy - self.busy) / 3600:.2f} h for the store"
        cpu = time.process_time() - self.cpu - workers_cpu
        made = Row(name, (CLOCK.now - self.now) / 3600, cpu, per_shard, usd, "; ".join(filter(None, (notes, waits))))
        self._take()
        return made

    def memory(self) -> list[str]:
        """The peak of this process, and how much of that is the store that it plays."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        names = sum(sys.getsizeof(path) + 200 for path in SlowStore.objects)
        held = names + sum(map(sys.getsizeof, SlowStore.objects.values()))
        throttled = ", ".join(f"{count:,} {kind}s" for kind, count in SlowStore.throttled.items() if count) or "none"
        return [
            f"Memory: the peak is {(peak - self.base) / 1000:,.0f} MB over the imports. The store that is played holds"
            f" about {held / 1e6:,.0f} MB of it, the driver {((peak - self.base) * 1000 - held) / 1e6:,.0f} MB.",
            f"Requests that waited because of their prefix's limit: {throttled}.",
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, meaning in (
        ("shards", 100_000, ""),
        ("workers", 1000, ""),
        ("images", 10_000, "of a shard"),
        ("image-bytes", 30_000, "with text and json"),
        ("annotate-rate", 100.0, "images a second of a worker"),
        ("select-rate", 5000.0, "images a second of a worker"),
        ("life", 6.0, "hours between two preemptions of a worker, on average"),
        ("answer", 0.05, "seconds until the store answers"),
    ):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{meaning} [%(default)s]")
    words = parser.parse_args()
    rows, notes = simulate(words)
    print(
        f"{words.shards:,} shards of {words.images:,} images, {words.workers:,} workers, answers after"
        f" {words.answer * 1000:.0f} ms, a worker is preempted every {words.life:g} h\n"
    )
    print("| step | hours (simulated) | CPU s of the driver | ms a shard | requests a shard | USD of requests | |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        asked = ", ".join(f"{who} {count:.2f}" for who, count in row.per_shard.items())
        ms = row.cpu / words.shards * 1000
        print(f"| {row.name} | {row.hours:.2f} | {row.cpu:.0f} | {ms:.2f} | {asked} | {row.usd:.2f} | {row.notes} |")
    print("\n" + "\n\n".join(notes))


if __name__ == "__main__":
    main()
