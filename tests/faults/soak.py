"""Random kills every few seconds, for as long as is asked: the balance must hold, the bytes be equal, nothing grow.

    python tests/faults/soak.py --minutes 30 --seed 0

Runs of 200 shards follow one another on a Ray of three nodes; every two to six seconds a worker, a node or the driver
is killed, and what is gone is started again. Prints a line a run and a summary; leaves with 1 where something differs.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from conftest import Bytes, Driver, Nodes, write_shard

NUM = 200
WEIGHTS = {"worker": 6, "node": 3, "driver": 1}


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def size(pid: int) -> tuple[float, int]:
    """Megabytes and open files of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(os.listdir(f"/proc/{pid}/fd"))


def hit(chance: random.Random, nodes: Nodes, run: Driver) -> str:
    """Kill something; returns what."""
    [what] = chance.choices(list(WEIGHTS), list(WEIGHTS.values()))
    if what == "node":
        nodes.lose()
        _ = nodes.address  # a new node takes its place
    elif what == "driver":
        run.send(signal.SIGKILL)
    elif workers := run.workers():
        os.kill(chance.choice(workers), signal.SIGKILL)
    else:
        return "nothing"
    return what


def go_through(run: Driver, nodes: Nodes, chance: random.Random, hits: Counter[str]) -> list[tuple[float, int]]:
    """Bring one run to its end under fire; the sizes of its longest-lived driver."""
    lives: list[list[tuple[float, int]]] = [[]]
    run.start("--address", nodes.address, "--pause", "0.02")
    due = time.monotonic() + chance.uniform(2, 6)
    while True:
        assert run.process is not None
        if run.process.poll() is not None:
            code, _, err = run.end()
            if code == 0:
                return max(lives, key=len)
            if code != -signal.SIGKILL:
                say(f"the driver left with {code}: {err[-300:]}")
                hits["driver gave up"] += 1
            lives.append([])
            run.start("--address", nodes.address, "--pause", "0.02")
        elif time.monotonic() > due:
            hits[hit(chance, nodes, run)] += 1
            due = time.monotonic() + chance.uniform(2, 6)
        else:
            lives[-1].append(size(run.process.pid))
            time.sleep(0.25)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    words = parser.parse_args()
    chance, hits, nodes, wrong, runs = random.Random(words.seed), Counter[str](), Nodes(2), 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        for i in range(NUM):
            write_shard(home / "web" / f"{i:05d}.tar", [f"text {i} {j}" for j in range(5)])
        calm = Driver(home / "calm", [str(home / "web")], home / "calm-pids")
        calm.run()
        expected: Bytes = calm.outputs()
        end = time.monotonic() + 60 * words.minutes
        while time.monotonic() < end:
            run = Driver(home / f"run-{runs}", [str(home / "web")], home / f"run-{runs}-pids")
            sizes = go_through(run, nodes, chance, hits)
            runs += 1
            equal = run.outputs() == expected
            wrong += not equal
            quarter = max(1, len(sizes) // 4)
            first, last = (
                [statistics.median(s[i] for s in part) for i in (0, 1)] for part in (sizes[:quarter], sizes[-quarter:])
            )
            say(f"run {runs}: equal {equal}; driver {first[0]:.0f} -> {last[0]:.0f} MB, {first[1]} -> {last[1]} files")
        nodes.stop()
    say(f"{words.minutes:g} minutes, {runs} runs of {NUM} shards, killed: {dict(hits)}; {wrong} runs differed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
