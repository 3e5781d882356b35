"""Tests of what only a GPU shows: on a real one with `make test-gpu`, and on the pretend GPU from `test_pretend.py`.

On a machine with a GPU they need no more than torch, transformers, pydantic, pyarrow, webdataset and pytest: nothing of
tests/conftest.py, which imports Ray: `pytest.ini` lies in this folder.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dialog_shards import dialog_shards  # noqa: F401  a fixture, as those below
from gpus import PRETEND, cuda, pretend_gpu, real_gpu, waits  # noqa: F401
from small_models import small_blip, small_world  # noqa: F401
from task_shards import task_shards  # noqa: F401

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    there = config.pluginmanager.has_plugin(PRETEND) or torch.cuda.is_available()
    for item in items:
        if item.path.parent == HERE and item.path.name != "test_pretend.py":
            item.add_marker(pytest.mark.gpu)
            if not there:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
