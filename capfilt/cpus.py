"""How many CPUs this process may use, which on a shared machine may be fewer than the machine has."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def available() -> int:
    """The number of CPUs that this process may use, at least 1.

    It is the least of the CPUs of the machine, the affinity of this process (taskset, cpusets, Slurm) and the quotas of
    its cgroups (containers, systemd), rounded down.
    """
    return max(1, math.floor(min(affinity(), quota())))


def affinity() -> int:
    """The CPUs on which this process may be scheduled."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS has no affinities


def quota(root: Path = Path("/")) -> float:
    """The CPU quota of the cgroups of this process and of their parents; infinity without a limit.

    `root` is the folder of /proc and /sys, for tests.
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
    except (OSError, ValueError, ZeroDivisionError):  # the group has no limit, or the kernel no such file
        return


def _groups(root: Path) -> Iterator[Path]:
    """The folders of the cgroups of this process and of their parents, as far as they are visible here."""
    mounts = [mount for line in _lines(root / "proc/self/mountinfo") if (mount := _mount(line))]
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, group = line.split(":", 2)
        mount_kind = "cpu" if controllers else ""  # v2 has one hierarchy, without a name
        if controllers and "cpu" not in controllers.split(","):
            continue
        for kind, top, mount_point in mounts:
            if kind == mount_kind:
                path = PurePosixPath(group)
                # In a container the root of the mount is its group, whatever the name of the group.
                inner = path.relative_to(top) if path.is_relative_to(top) else PurePosixPath()
                for part in (inner, *inner.parents):
                    yield root / mount_point.lstrip("/") / part


def _mount(line: str) -> tuple[str, str, str] | None:
    """The kind of a cgroup mount ("" for v2, "cpu"), the part of the hierarchy that it shows, and its mount point."""
    before, _, after = line.partition(" - ")
    _, _, _, top, mount_point, *_ = before.split()
    kind, _, options = after.split()
    if kind == "cgroup2":
        return "", top, mount_point
    return ("cpu", top, mount_point) if kind == "cgroup" and "cpu" in options.split(",") else None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:  # not Linux
        return []
