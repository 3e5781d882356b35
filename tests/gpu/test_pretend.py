"""The tests of this folder on the pretend GPU, where there is none: in a process of their own, since it must be there
before torch is imported. Needs g++ and torch's build for CPUs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++, which builds what the pretend GPU needs"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="torch is a build for CUDA"),
]


def on_pretend_gpu(*arguments: str) -> None:
    """Run tests of this folder; they must pass, and be there."""
    command = (sys.executable, "-m", "pytest", "-q", "-c", "pytest.ini", "-p", "pretend_gpu.plugin", "--tb=short")
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([*command, *arguments], cwd=HERE, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout


def test_texts_and_scores() -> None:
    on_pretend_gpu("test_annotate.py", "test_ceilings.py", "-k", "nucleus-two or scoring")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all() -> None:
    on_pretend_gpu(*sorted(path.name for path in HERE.glob("test_*.py") if path.name != Path(__file__).name))
