"""Tests of what only a GPU shows: on a real one with `make test-gpu`, and on the pretend GPU from `test_pretend.py`.

On a machine with a GPU they need no more than torch, transformers, pydantic, pyarrow, webdataset and pytest: nothing of
tests/conftest.py (`--confcutdir`), which imports Ray.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import small_blip, small_blip2, small_clip, small_world  # noqa: F401  fixtures

PRETEND = "pretend_gpu.plugin"
Waits = Callable[[], AbstractContextManager[list[str]]]
HERE = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    there = config.pluginmanager.has_plugin(PRETEND) or torch.cuda.is_available()
    for item in items:
        if item.path.parent == HERE and item.path.name != "test_pretend.py":
            item.add_marker(pytest.mark.gpu)
            if not there:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def cuda() -> torch.device:
    """The GPU, real or pretend, in full fp32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda", 0)


@pytest.fixture
def real_gpu(pytestconfig: pytest.Config, cuda: torch.device) -> torch.device:
    """The GPU; the test is skipped on the pretend one."""
    if pytestconfig.pluginmanager.has_plugin(PRETEND):
        pytest.skip("it says something of a real GPU alone")
    return cuda


@pytest.fixture
def pretend_gpu(pytestconfig: pytest.Config) -> Any:
    """What was done on the pretend GPU, `pretend_gpu.record.Record`; the test is skipped on a real one."""
    if not pytestconfig.pluginmanager.has_plugin(PRETEND):
        pytest.skip("only the pretend GPU counts kernels")
    from pretend_gpu.tensors import RECORD

    return RECORD


@pytest.fixture
def waits(pytestconfig: pytest.Config) -> Waits:
    """Makes a block in which each wait of the host for the device is added to a list, with the line that caused it."""
    if pytestconfig.pluginmanager.has_plugin(PRETEND):
        return _pretend_waits
    return _real_waits


@contextmanager
def _pretend_waits() -> Iterator[list[str]]:
    from pretend_gpu.tensors import RECORD

    RECORD.clear()
    found: list[str] = []
    yield found
    found += RECORD.waits


@contextmanager
def _real_waits() -> Iterator[list[str]]:
    found: list[str] = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found += [f"{each.filename}:{each.lineno}" for each in said if "synchronizing CUDA operation" in str(each.message)]
