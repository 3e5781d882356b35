"""Small runs write what they wrote when `tests/goldens/run` was made, byte for byte, and runs cut then go on now."""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

GOLDENS = Path(__file__).parent / "run"
CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
DECIDE = ("numpy", "pillow", "pyarrow", "safetensors", "tokenizers", "torch", "transformers")
"""The packages that decide the bytes of a run."""
TWICE = {
    "captioner": {"log.jsonl"},
    "annotate": {"log.jsonl", "round-1/ledger/annotate.pace.json", "round-1/ledger/annotate.plan.jsonl"},
    "pretrain": {"log.jsonl"},
    "stage-1": {"log.jsonl"},
    "stage-2": {"log.jsonl"},
}
"""What of a cut run says that two commands worked on it, beside the log of a training that was cut."""


def elsewhere() -> str:
    """Why bytes cannot be compared here; "" where they can."""
    cpuinfo = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not cpuinfo.is_file() or " avx2" not in cpuinfo.read_text():
        return "the goldens are of a CPU with AVX2 under Linux, and others give other last bits"
    tested = dict(re.findall(r"^([\w-]+)==(\S+)$", CONSTRAINTS.read_text(), re.MULTILINE))
    other = [f"{name} {version(name)}" for name in DECIDE if version(name).partition("+")[0] != tested[name]]
    return f"the goldens are of constraints.txt, and here is {', '.join(other)}" if other else ""


pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(elsewhere()), reason=elsewhere())]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `make_run.py` makes, in one process that computes as with AVX2 from its beginning."""
    work = tmp_path_factory.mktemp("made")
    for what in ("whole", "resume"):
        (work / what).mkdir()
        for path in (*GOLDENS.glob("*.yaml"), GOLDENS / "cuts.tar.xz"):
            shutil.copy(path, work / what)
    command = [sys.executable, str(GOLDENS.parent / "make_run.py"), "whole", "resume"]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    trees: dict[str, Any] = json.loads(done.stdout)
    return trees


def golden(name: str) -> dict[str, Any]:
    actual: dict[str, Any] = json.loads((GOLDENS / f"{name}.json").read_text())
    return actual


def compare(actual: dict[str, Any], wanted: dict[str, Any]) -> None:
    lines = differences(actual, wanted)
    assert not lines, "\n".join([f"{len(lines)} differences, the first of them:", *lines[:20]])


def differences(actual: Any, wanted: Any, where: str = "") -> list[str]:
    """Where two trees differ, and how."""
    if isinstance(actual, dict) and isinstance(wanted, dict):
        return [
            line
            for key in (*wanted, *(key for key in actual if key not in wanted))
            for line in differences(actual.get(key, "nothing"), wanted.get(key, "nothing"), f"{where} {key}")
        ]
    if isinstance(actual, list) and isinstance(wanted, list) and len(actual) == len(wanted):
        return [
            line
            for i, pair in enumerate(zip(actual, wanted, strict=True))
            for line in differences(*pair, f"{where}[{i}]")
        ]
    return [] if actual == wanted else [f"{where.strip()}: found {str(actual)[:200]}, wanted {str(wanted)[:200]}"]


def test_every_verb_writes_what_it_wrote(made: dict[str, Any]) -> None:
    """bootstrap, annotate, select, evaluate, pretrain, download: all files, and what they say with --json."""
    wanted = golden("runs")
    wanted.pop("commit")
    compare(made["whole"], wanted)


def test_runs_that_were_cut_go_on_to_the_bytes_of_an_uncut_one(made: dict[str, Any]) -> None:
    """Cut in round 1: in the captioner's training and in the model's, with states halfway, and between two shards."""
    resumed_runs, wanted = made["resume"], golden("runs")
    assert set(resumed_runs) == set(TWICE)
    for name, twice in TWICE.items():
        run = resumed_runs[name]["run"]
        resumed = [line.pop("resumed", 0) for line in run.get(f"round-1/{name}/log.jsonl", [])]
        assert twice <= set(run)
        uncut = wanted["blip2" if name.startswith("stage-") else "bootstrap"]
        compare(*({k: tree[k] for k in tree if k not in twice} for tree in (run, uncut)))
        assert resumed == ([] if name == "annotate" else [0, 0, 2, 0])
    # What was there stayed: nothing that was committed was done again.
    assert {name: resumed_runs[name]["kept"] for name in resumed_runs} == golden("cuts")["kept"]
