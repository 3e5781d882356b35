from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from capfilt.data.loading.prefetch import prefetched


def test_hands_over_items_then_the_exception() -> None:
    def make() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("third")

    found = []
    with pytest.raises(ValueError, match="third"):
        for item in prefetched(make(), threading.Event()):
            found.append(item)
    assert found == [1, 2]


def test_ends_where_its_source_ends() -> None:
    assert list(prefetched(iter([1, 2, 3]), threading.Event())) == [1, 2, 3]


def test_runs_no_further_than_its_depth_and_stops_when_closed() -> None:
    made: list[int] = []

    def make() -> Iterator[int]:
        while True:
            made.append(len(made))
            yield made[-1]

    before = threading.active_count()
    items = prefetched(make(), threading.Event(), depth=2)
    assert next(items) == 0
    deadline = time.monotonic() + 60
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 4  # one taken, two waiting, one in hand
    items.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
    assert len(made) == 4


def test_closing_waits_for_what_is_being_made() -> None:
    """An interpreter must not end while a thread of it is inside torch: that is an abort."""
    begun, ended = threading.Event(), threading.Event()

    def make() -> Iterator[int]:
        yield 0
        begun.set()
        time.sleep(0.2)
        ended.set()
        yield 1

    items = prefetched(make(), threading.Event())
    assert next(items) == 0
    assert begun.wait(60)
    items.close()  # type: ignore[attr-defined]
    assert ended.is_set()


UNCLOSED = """
import torch
from capfilt.data.loading.prefetch import Prefetched

def make():
    x = torch.randn(200, 200)
    while True:
        for _ in range(100):
            x = (x @ x).tanh()
        yield x

for ahead in [Prefetched(make(), depth=10**6) for _ in range(4)]:
    next(ahead)
"""


def test_an_interpreter_ends_well_with_threads_that_nobody_closed() -> None:
    done = subprocess.run([sys.executable, "-c", UNCLOSED], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
