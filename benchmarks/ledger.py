"""What the book-keeping of a run costs: empty jobs on 1,000, 10,000 and 100,000 shards.

    python benchmarks/ledger.py 1000 10000 100000 --out /tmp/ledger-bench

For each number a process of its own plans a stage, runs it on a Ray of this machine, plans it again when all of it is
done, and asks for its status. Printed, as a row of Markdown: seconds to plan (fingerprints, what is done already, the
plan written), CPU of the driver a shard while the jobs run, shards a second, seconds to find that all is done, seconds
of `capfilt status`, and the peak memory of the driver. Targets: a plan of 100,000 in 60 s and 1 GB, 5 ms a shard.
`--mute` leaves the metrics out, to see what they cost.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from capfilt.cluster.session import Session, connect
from capfilt.cluster.worker_pool import Resources
from capfilt.config import Config
from capfilt.data import shards
from capfilt.pipelines.inspect import status as statuses
from capfilt.runs import stage_status
from capfilt.runs.ledger import Ledger, fingerprint
from capfilt.runs.progress import Progress
from capfilt.runs.run import Run
from capfilt.runs.tally import Tally
from capfilt.stages import runner

COLUMNS = ("shards", "plan s", "driver ms a shard", "shards/s", "find all done s", "status s", "peak MB")


class Empty(Config):
    """Commits that a shard had one sample, and reads nothing."""

    out: Path

    @property
    def name(self) -> str:
        return "empty"

    def identity(self, item: str) -> str:
        return fingerprint(self.model_dump(mode="json", exclude={"out"}), shards.stat(item))

    def open(self) -> Callable[[str], str]:
        def work(item: str) -> str:
            tally = Tally(samples=Counter({"in": 1, "kept": 1}))
            Ledger(self.out, self.name).commit(shards.name(item), self.identity(item), [], tally)
            return ""

        return work


class StageTimer:
    """Wall and CPU seconds of this process between two looks."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def lap(self) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        spent = wall - self.wall, cpu - self.cpu
        self.wall, self.cpu = wall, cpu
        return spent


def make(folder: Path, num: int) -> None:
    """So many empty files that are called shards."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(num):
        (folder / f"{i:06d}.tar").touch()


def watched(clock: StageTimer, spent: list[float]) -> Callable[..., Iterator[object]]:
    """`run_items`, noting when the planning before it ended."""
    real = runner.run_items

    def run_items(*words: object, **more: object) -> Iterator[object]:
        spent.append(clock.lap()[0])
        return real(*words, **more)  # type: ignore[arg-type]

    return run_items


def measure(out: Path, num: int) -> list[str]:
    """One row of the table."""
    web, run = out / f"web-{num}", out / f"run-{num}"
    make(web, num)
    spent: list[float] = []
    with connect("start", cpus=2) as session:
        clock = StageTimer()
        urls = shards.expand(str(web))
        Run.open(run, "", {"verb": "empty", "shards": urls})
        job, show = Empty(out=run.absolute()), Progress(quiet=True)
        runner.run_items = watched(clock, spent)  # type: ignore[assignment]
        assert runner.run_stage(session, job, shards.by_name(urls), Resources(), show, "empty").samples["kept"] == num
        wall, cpu = clock.lap()
        assert runner.run_stage(session, job, shards.by_name(urls), Resources(), show, "empty").samples["kept"] == num
        again = spent[1] if len(spent) > 1 else clock.lap()[0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    clock.lap()
    assert statuses.run(run)["stages"][0]["done"] == num
    assert len(stage_status.find_ledgers(run)) == 1
    ms, rate, asked = 1000 * cpu / num, num / wall, clock.lap()[0]
    return [str(num), f"{spent[0]:.1f}", f"{ms:.2f}", f"{rate:.0f}", f"{again:.1f}", f"{asked:.1f}", f"{peak:.0f}"]


def tell(cells: Sequence[str]) -> None:
    """A row of Markdown."""
    sys.stdout.write(f"| {' | '.join(cells)} |\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("num", type=int, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--mute", action="store_true", help="no metrics")
    parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.mute:
        Session.report = lambda *_: None  # type: ignore[method-assign]
    if words.row:
        tell(measure(words.out, words.num[0]))
        return
    tell(COLUMNS)
    tell(["---"] * len(COLUMNS))
    for num in words.num:  # each in a process of its own: its peak memory is then its own
        mute = ["--mute"] if words.mute else []
        subprocess.run([sys.executable, __file__, str(num), "--out", str(words.out), "--row", *mute], check=True)


if __name__ == "__main__":
    main()
