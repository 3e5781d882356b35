"""What this machine has: CPUs, memory, GPUs, disk; limits of containers count, as the work will meet them.

GPUs are those that the driver lists. torch is not asked: importing it takes seconds, and it may be a build that sees
none, which `capfilt doctor` finds by comparing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from capfilt import cpus
from capfilt.cluster.session import connect
from capfilt.runs.progress import Progress

GB = 10**9
_LIMITS = ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes")
_QUERY = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]


@dataclass(frozen=True)
class Machine:
    """A machine, or the cluster at an address."""

    cpus: int
    gpus: tuple[str, ...]
    """The name of each, with its memory; of a cluster "GPU"."""
    memory: int
    """Bytes; of a cluster, of this machine."""
    disk: int
    """Free bytes where run folders will lie."""
    address: str = "start"

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "gpus": list(self.gpus)}

    def __str__(self) -> str:
        """For a person."""
        names = dict.fromkeys(self.gpus)
        gpus = ", ".join(f"{self.gpus.count(name)} x {name}" for name in names) or "no GPU"
        where = "" if self.address in ("start", "local") else f" in the cluster at {self.address}"
        memory, free = self.memory / GB, self.disk / GB
        return f"{self.cpus} CPUs, {gpus}{where}, {memory:,.0f} GB of memory, {free:,.0f} GB free on disk"


def look(address: str, folder: Path, show: Progress) -> Machine:
    """This machine; or the CPUs and GPUs of a running cluster. ClusterError where none answers."""
    memory, disk = memory_bytes(), shutil.disk_usage(nearest(folder)).free
    if address in ("start", "local"):
        return Machine(cpus.available(), tuple(gpus()), memory, disk, address)
    with connect(address, show=show) as session:
        return Machine(session.capacity(1), ("GPU",) * session.capacity(0, 1), memory, disk, address)


def gpus() -> list[str]:
    """The GPUs that NVIDIA's driver lists; [] without one."""
    try:
        done = subprocess.run(_QUERY, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.rpartition(",") for line in done.stdout.splitlines() if "," in line]
    return [f"{name.strip()} ({int(size) / 1024:.0f} GiB)" if size.strip().isdigit() else name for name, _, size in rows]


def memory_bytes(root: Path = Path("/")) -> int:
    """The memory of this machine, or what its container may use. `root` is the folder of /sys, for tests."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in _LIMITS:
        path = root / limit
        text = path.read_text().strip() if path.is_file() else ""
        found += [int(text)] if text.isdigit() and int(text) else []
    return min(found)


def nearest(folder: Path) -> Path:
    """The folder, or the one above it that exists."""
    path = folder.absolute()
    return next(each for each in (path, *path.parents) if each.is_dir())
