"""What this machine has: CPUs, memory, GPUs, disk; limits of containers count, as the work will meet them.

GPUs are those that the driver lists. torch is not asked: importing it takes seconds, and it may be a build that sees
none, which `capfilt doctor` finds by comparing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from capfilt import cpus
from capfilt.cluster.session import connect
from capfilt.runs.progress import Progress

GB = 10**9
_LIMITS = ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Machine:
    """This machine; or the CPUs and GPUs of the cluster at an address, with this machine's memory and disk."""

    cpus: int
    gpus: tuple[str, ...]
    """The name of each."""
    memory: int
    """Bytes."""
    disk: int
    """Free bytes where run folders will lie."""
    address: str = "start"

    @classmethod
    def look(cls, address: str, folder: Path, show: Progress) -> Machine:
        """What there is. ClusterError where no cluster answers at the address."""
        rest = (memory(), shutil.disk_usage(nearest(folder)).free, address)
        if address in ("start", "local"):
            return cls(cpus.available(), tuple(gpus()), *rest)
        with connect(address, show=show) as session:
            return cls(session.capacity(1), ("GPU",) * session.capacity(0, 1), *rest)

    def __str__(self) -> str:
        """For a person."""
        names = dict.fromkeys(self.gpus)
        cards = ", ".join(f"{self.gpus.count(name)} x {name}" for name in names) or "no GPU"
        where = "" if self.address in ("start", "local") else f" in the cluster at {self.address}"
        return (
            f"{self.cpus} CPUs, {cards}{where}, {self.memory / GB:,.0f} GB memory, {self.disk / GB:,.0f} GB free disk"
        )


def gpus() -> list[str]:
    """The names of the GPUs that NVIDIA's driver lists; [] without one."""
    words = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.split("\n")[:-1]


def memory(root: Path = Path("/")) -> int:
    """Bytes of memory of this machine, or those its container may use. `root` is the folder of /sys, for tests."""
    limits = [text for limit in _LIMITS if (root / limit).is_file() and (text := (root / limit).read_text().strip())]
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([whole, *(int(limit) for limit in limits if limit.isdigit())])


def nearest(folder: Path) -> Path:
    """The folder, or the one above it that exists."""
    path = folder.absolute()
    return next(each for each in (path, *path.parents) if each.is_dir())
