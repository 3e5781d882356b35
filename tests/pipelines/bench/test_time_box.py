from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

import pytest

from capfilt.pipelines.bench.time_box import TimeBox


@pytest.mark.parametrize(
    ("given", "size", "asked"),
    [(0, 100, [2, 2, 16, 100]), (6, 6, [2]), (1, 1, [1])],
    ids=["found", "given", "fewer than the first"],
)
def test_what_is_measured_was_warmed_up(given: int, size: int, asked: list[int]) -> None:
    """A given number too: the first pass imports modules and chooses kernels, and is no repeat."""
    calls: list[int] = []

    def run(number: int) -> float:
        calls.append(number)
        return number / 100

    line: Any = MagicMock()
    assert TimeBox(7.0, 5, line).size(run, 2, 1000, given) == size
    assert calls == asked
