"""The numeric tests again under lesser instruction sets than this machine has: what is promised of numbers must not
hold on one kind of CPU alone. The suite itself runs under the machine's own, but for tests/goldens, which runs whole
pipelines under AVX2.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

SETS = {
    "DEFAULT": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}
"""By torch's name of an instruction set, what keeps torch, oneDNN and MKL to it."""

TESTS = (
    "tests/inference", "tests/models", "tests/objectives", "tests/evaluation",
    "tests/training/distributed/test_step_of_ranks.py",
    "tests/training/test_deterministic.py",
    "tests/pipelines/test_annotate.py::test_the_seed_decides_the_texts_and_batches_do_not",
    "tests/pipelines/test_annotate.py::test_out_of_memory_is_reported_and_changes_nothing",
)  # fmt: skip

RUN = """
import sys
import pytest
import torch

found = torch.backends.cpu.get_cpu_capability()
assert found == sys.argv[1], f"torch computes with {found}"
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-m", "not gpu", *sys.argv[2:]]))
"""


def run(instructions: str) -> str:
    """What pytest says of these tests in a process of its own; it must succeed."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, instructions, *TESTS],
        cwd=ROOT,
        env={**os.environ, **SETS[instructions], "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=2300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def lesser() -> list[str]:
    """The instruction sets below this machine's, the nearest last."""
    order = ["DEFAULT", "AVX2", "AVX512"]
    own = torch.backends.cpu.get_cpu_capability()
    return order[: order.index(own)] if own in order else []


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("instructions", SETS)
def test_every_numeric_test_holds_under_each(instructions: str) -> None:
    if instructions not in lesser():
        pytest.skip(f"this machine's own is {torch.backends.cpu.get_cpu_capability()}, under which the suite runs")
    said = run(instructions)
    assert int(said.split(" passed")[0].split()[-1]) >= 500, said
