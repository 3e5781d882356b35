from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from capfilt import cpus

V2 = "35 25 0:30 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
    "33 31 0:30 {top} /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:31 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset\n"
)
V1_GROUPS = "5:cpuset:/\n4:cpu,cpuacct:/docker/a1\n1:name=systemd:/\n0::/\n"


def machine(root: Path, mounts: str, groups: str, files: dict[str, str]) -> Path:
    """A /proc and a /sys with these cgroups."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/mountinfo").write_text(f"22 28 0:20 / /sys rw shared:7 - sysfs sysfs rw\n{mounts}")
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


@pytest.mark.parametrize(
    ("mounts", "groups", "files", "expected"),
    [
        pytest.param(V2, "0::/", {"cpu.max": "150000 100000"}, 1.5, id="v2, a container"),
        pytest.param(V2, "0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000"}, 0.5, id="v2, above"),
        pytest.param(V2, "0::/a/b", {"a/b/cpu.max": "300000 100000", "a/cpu.max": "400000 100000"}, 3, id="v2, own"),
        pytest.param(V2, "0::/a", {"a/cpu.max": "max 100000"}, math.inf, id="v2, none"),
        pytest.param(
            V1.format(top="/"), V1_GROUPS,
            {"cpu,cpuacct/docker/a1/cpu.cfs_quota_us": "200000", "cpu,cpuacct/docker/a1/cpu.cfs_period_us": "100000"},
            2, id="v1",
        ),
        pytest.param(
            V1.format(top="/docker/a1"), V1_GROUPS,
            {"cpu,cpuacct/cpu.cfs_quota_us": "70000", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, 0.7,
            id="v1, a container that sees its own group",
        ),
        pytest.param(
            V1.format(top="/"), V1_GROUPS, {"cpu,cpuacct/docker/a1/cpu.cfs_quota_us": "-1"}, math.inf, id="v1, none"
        ),
        pytest.param("", "", {}, math.inf, id="no cgroups"),
        pytest.param(V2, "0::/", {"cpu.max": "what is this"}, math.inf, id="a kernel of tomorrow"),
    ],
)  # fmt: skip
def test_the_quota_of_a_cgroup_and_of_those_above(
    tmp_path: Path, mounts: str, groups: str, files: dict[str, str], expected: float
) -> None:
    assert cpus.quota(machine(tmp_path, mounts, groups, files)) == expected


def test_a_machine_without_proc_has_no_quota(tmp_path: Path) -> None:
    assert cpus.quota(tmp_path) == math.inf


@pytest.mark.parametrize(
    ("allowed", "quota", "expected"), [(8, math.inf, 8), (8, 2.9, 2), (2, 4.0, 2), (8, 0.5, 1), (1, math.inf, 1)]
)
def test_the_fewest_count_and_one_at_least(
    monkeypatch: pytest.MonkeyPatch, allowed: int, quota: float, expected: int
) -> None:
    monkeypatch.setattr(cpus, "affinity", lambda: allowed)
    monkeypatch.setattr(cpus, "quota", lambda: quota)
    assert cpus.available() == expected


def test_a_process_that_is_kept_on_one_core_counts_one() -> None:
    def one_core() -> None:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    words = [sys.executable, "-c", "from capfilt import cpus; print(cpus.available())"]
    assert subprocess.run(words, preexec_fn=one_core, capture_output=True, text=True, check=True).stdout == "1\n"
