"""The demo's figures: quality by seed and round, seconds, and the memory of all its processes together.

    python benchmarks/demo.py --seeds 0 1 2

Runs `capfilt bootstrap --rounds 2 --set seed=SEED` for each seed, one after the other, in an empty folder, and prints
the tables of LOG.md. Memory is the peak, sampled twice a second, of the sum over the command and every process it
started of what each has to itself plus its share of what it shares (Pss in /proc; Linux only). Run it on a machine that
does nothing else.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

KINDS = ("other", "boilerplate", "seo", "truncated", "attribute")
BETTER = ("mean R@1", "CIDEr")


def descendants(pid: int) -> list[int]:
    """A process and all that it started, directly or not."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [pid, *(below for child in children for below in descendants(child))]


def pss(pid: int) -> int:
    """Bytes of memory of one process, shared pages divided among their owners; 0 for one that has just ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def run(seed: int, out: Path) -> dict[str, Any]:
    """One demo: its summary, its seconds and its peak bytes."""
    command = [sys.executable, "-m", "capfilt", "bootstrap", "--rounds", "2", "--set", f"seed={seed}"]
    begun, peak, over = time.monotonic(), 0, threading.Event()
    process = subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.DEVNULL)

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.5):
            peak = max(peak, sum(map(pss, descendants(process.pid))))

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    over.set()
    watcher.join()
    if code:
        sys.exit(f"seed {seed} ended with {code}")
    summary = json.loads((out / "summary.json").read_text())
    return {"seed": seed, "seconds": time.monotonic() - begun, "peak": peak, "rounds": summary["rounds"]}


def row(seed: int, entry: dict[str, Any]) -> str:
    """One round as a line of the table; what was not measured stays empty."""
    judged, retrieval = entry.get("filter", {}), entry["retrieval"]
    cells: list[object] = [seed, entry["round"], f"{retrieval['tr@1']:.1f}", f"{retrieval['ir@1']:.1f}"]
    cells += [f"{entry['captioning']['cider']:.1f}"]
    cells += [entry[name][source] if name in entry else "" for name in ("kept",) for source in ("web", "synthetic")]
    areas = judged.get("auc_by_kind", {})
    figures = [judged.get("precision"), judged.get("recall"), judged.get("auc"), *(areas.get(kind) for kind in KINDS)]
    cells += ["" if figure is None else f"{figure:.3f}" for figure in figures]
    return f"| {' | '.join(map(str, cells))} |"


def quality(entry: dict[str, Any]) -> dict[str, float]:
    """The two figures by which the last round must beat round 0."""
    retrieval = entry["retrieval"]
    return {BETTER[0]: (retrieval["tr@1"] + retrieval["ir@1"]) / 2, BETTER[1]: entry["captioning"]["cider"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    seeds = parser.parse_args().seeds
    with tempfile.TemporaryDirectory(prefix="capfilt-demo-") as scratch:
        runs = [run(seed, Path(scratch, f"seed-{seed}")) for seed in seeds]
    head = [
        "seed",
        "round",
        "TR@1",
        "IR@1",
        "CIDEr",
        "web kept",
        "synthetic kept",
        "precision",
        "recall",
        "AUC all",
        *KINDS,
    ]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for one in runs:
        for entry in one["rounds"]:
            print(row(one["seed"], entry))
    print("\n| seed | seconds | peak memory, GB |\n|---|---|---|")
    for one in runs:
        print(f"| {one['seed']} | {one['seconds']:.0f} | {one['peak'] / 1e9:.2f} |")
    print()
    for name in BETTER:
        first, last = (sum(quality(one["rounds"][i])[name] for one in runs) / len(runs) for i in (0, -1))
        print(
            f"{name}, mean of {len(runs)} seeds, round 0 -> last: {first:.1f} -> {last:.1f} ({last / first - 1:+.0%})"
        )


if __name__ == "__main__":
    main()
