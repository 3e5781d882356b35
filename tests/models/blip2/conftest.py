"""The comparisons of benchmarks/parity_blip2.py, for all tests that are here."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def parity(pytestconfig: pytest.Config) -> ModuleType:
    """The module benchmarks/parity_blip2.py, which imports transformers: once for all that is here."""
    path = pytestconfig.rootpath / "benchmarks" / "parity_blip2.py"
    spec = importlib.util.spec_from_file_location("parity_blip2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["parity_blip2"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
