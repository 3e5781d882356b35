"""How many CPUs this process may use, which on a shared machine are not all that it has."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def available() -> int:
    """The fewest of: CPUs of the machine, of this process's affinity (taskset, cpusets, Slurm), of its cgroups' quotas
    (containers, systemd), rounded down; at least 1.
    """
    return max(1, math.floor(min(affinity(), quota())))


def affinity() -> int:
    """The CPUs on which this process may be scheduled."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS has no affinities


def quota(root: Path = Path("/")) -> float:
    """The CPUs that the cgroups of this process may use at a time; infinity where there is no limit.

    A limit of any group above counts, too. `root` is where /proc and /sys are looked for.
    """
    return min((limit for folder in _groups(root) for limit in _limits(folder)), default=math.inf)


def _limits(folder: Path) -> Iterator[float]:
    try:
        if (file := folder / "cpu.max").is_file():  # cgroup v2: "200000 100000", or "max 100000"
            amount, period = file.read_text().split()
        else:
            amount, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        if amount not in ("max", "-1"):
            yield int(amount) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # a group without a limit, or a kernel that has none
        return


def _groups(root: Path) -> Iterator[Path]:
    """The folders of the cgroups that this process is in, and of those above, as far as they can be seen here."""
    mounts = [mount for line in _lines(root / "proc/self/mountinfo") if (mount := _mount(line))]
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, group = line.split(":", 2)
        wanted = "cpu" if controllers else ""  # v2 has one hierarchy, without a name
        if controllers and "cpu" not in controllers.split(","):
            continue
        for kind, top, where in mounts:
            if kind == wanted:
                own = PurePosixPath(group)
                # A container sees its own group as the mount's root, by whatever name.
                inner = own.relative_to(top) if own.is_relative_to(top) else PurePosixPath()
                for part in (inner, *inner.parents):
                    yield root / where.lstrip("/") / part


def _mount(line: str) -> tuple[str, str, str] | None:
    """The kind of a cgroup mount ("" for v2, "cpu"), what of the hierarchy it shows, and where."""
    before, _, after = line.partition(" - ")
    _, _, _, top, where, *_ = before.split()
    kind, _, options = after.split()
    if kind == "cgroup2":
        return "", top, where
    return ("cpu", top, where) if kind == "cgroup" and "cpu" in options.split(",") else None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:  # not Linux
        return []
