"""docs/cluster.md: each of its commands that needs no cloud is run, on two Ray nodes in namespaces of their own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOC = ROOT / "docs/cluster.md"

ALONE = ("unshare", "--map-root-user", "--net", "--pid", "--fork", "--mount", "--mount-proc")
# The document's ports, /mnt and ~ are all free here, and whatever is left running ends with the last line.
BEFORE = """
set -euo pipefail
ip link set lo up
ip link add inner type veth peer name outer
ip addr add 10.0.0.1/24 dev inner
ip link set inner up
mount -t tmpfs tmpfs /mnt
mkdir /mnt/home /mnt/tmp /mnt/capfilt
# Ray keeps its sessions in /tmp/ray. Not all of /tmp is hidden: this very checkout may lie in it.
mkdir -p /tmp/ray
mount -t tmpfs tmpfs /tmp/ray
export HOME=/mnt/home TMPDIR=/mnt/tmp RAY_USAGE_STATS_ENABLED=0
cd /mnt/home
"""
# Of Slurm there are two stand-ins, for its list of machines and for running a command on each; Ray's part is real.
AFTER = """
id=$(capfilt jobs --address http://$HEAD:8265 --json | sed -n 's/.*"id": "\\(capfilt-select-[^"]*\\)".*/\\1/p')
capfilt jobs $id --address http://$HEAD:8265
capfilt verify /mnt/capfilt/runs/smoke
capfilt verify /mnt/capfilt/runs/smoke-half
ray stop > /dev/null 2>&1
mkdir /mnt/bin
printf '#!/bin/sh\nhostname\n' > /mnt/bin/scontrol
printf '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n' > /mnt/bin/srun
chmod +x /mnt/bin/*
export PATH=/mnt/bin:$PATH SLURM_JOB_ID=7 SLURM_JOB_NUM_NODES=1 SLURM_JOB_NODELIST=here SLURM_CPUS_PER_TASK=2
bash $ROOT/deploy/slurm.sh select /mnt/capfilt/runs/smoke/data/web --annotations /mnt/capfilt/runs/smoke/round-1 \
    --out /mnt/capfilt/runs/smoke-third --set threshold=keep-rate --set keep_rate=0.33 2> /dev/null
capfilt verify /mnt/capfilt/runs/smoke-third
! bash $ROOT/deploy/slurm.sh select /mnt/nothing --annotations /mnt/nothing --out /mnt/capfilt/runs/no 2> /dev/null
echo RESULT
cat /mnt/capfilt/runs/smoke/summary.json
"""


def blocks(kind: str) -> list[str]:
    """The fenced blocks of a kind, in order."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", DOC.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_local_command_of_the_document_runs_on_two_nodes() -> None:
    if (
        not shutil.which("unshare")
        or subprocess.run([*ALONE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], check=False).returncode
    ):
        pytest.skip("no namespaces here (unshare --net --pid --mount)")
    local = blocks("bash local")
    assert len(local) == 5
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "ROOT": str(ROOT)}
    path["CAPFILT_VENV"] = str(Path(sys.executable).parents[1])
    ours = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [*ALONE, "bash", "-c", "\n".join([BEFORE, *local, AFTER])],
        env={**ours, **path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said, result = done.stdout.split("RESULT\n")
    summary = json.loads(result)
    assert [entry["round"] for entry in summary["rounds"]] == [0, 1]
    assert summary["rounds"][1]["samples_in"] == 400
    assert said.count("everything is as it was committed") == 3
    assert re.search(r"│ capfilt-bootstrap-smoke-\w{8} +│ bootstrap +│ /mnt/capfilt/runs/smoke +│ succeeded", said)
    assert "/mnt/capfilt/runs/smoke: done: every stage that was begun" in said


def test_the_table_of_costs_is_that_of_the_benchmark() -> None:
    benchmark = (ROOT / "benchmarks/annotate_cpu_2026-11-24.md").read_text()
    section = (ROOT / "docs/performance.md").read_text().split("\n## Annotate\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| .* \| ([\d.]+) \| ([\d.]+) \| (\d+) \|$", section, re.MULTILINE)
    assert len(rows) == 3
    for rate, shards, hours in rows:
        assert f"| {rate} |" in benchmark
        assert float(shards) == pytest.approx(float(rate) * 3600 / 10_000, abs=0.05)
        assert int(hours) == round(2 * 1e6 / float(rate) / 3600)
