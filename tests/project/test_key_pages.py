"""docs/keys/ says what the code says, of every key."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from capfilt.config import Config
from capfilt.evaluation.config import EvaluateConfig
from capfilt.pipelines.inspect import show
from capfilt.pipelines.inspect.keys import keys_of

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "make_keys.py"))


def test_the_pages_are_those_that_the_code_makes(script: dict[str, Any]) -> None:
    pages = script["pages"]()
    stale = [name for name, text in pages.items() if (DOCS / "keys" / name).read_text() != text]
    assert not stale, "run `python docs/make_keys.py` and read the diff"
    assert {path.name for path in (DOCS / "keys").iterdir()} == pages.keys()


def without_meaning(kind: type[Config], seen: set[type]) -> list[str]:
    if kind in seen:
        return []
    seen.add(kind)
    keys = keys_of(kind)
    bare = [f"{kind.__name__}.{key.name}" for key in keys if not key.meaning]
    return bare + [name for key in keys for section in key.sections for name in without_meaning(section, seen)]


def test_every_key_has_a_docstring() -> None:
    kinds = [*(kind for kinds in show.KINDS.values() for kind in kinds), EvaluateConfig]
    seen: set[type] = set()
    assert [name for kind in kinds for name in without_meaning(kind, seen)] == []
    assert len(seen) > 20
