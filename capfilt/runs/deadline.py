"""The time that one piece of work may take in this process, asked for again and again by who reads for it.

There is no signal and no second thread behind it, so nothing is cut in the middle of a write. What it does not end is
a single call that never returns: a read that the storage does not answer, one step of a model. On Ray the driver ends
those, by ending their process.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from capfilt.errors import TimeLimitError

_ends: float = float("inf")
_limit: float = 0.0


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Let what runs in this block take so many seconds; 0 = as long as it likes."""
    global _ends, _limit
    before = _ends, _limit
    if seconds and (ends := time.monotonic() + seconds) < _ends:
        _ends, _limit = ends, seconds
    try:
        yield
    finally:
        _ends, _limit = before


def check() -> None:
    """Go on, or raise TimeLimitError where the time is over."""
    if time.monotonic() > _ends:
        raise TimeLimitError(f"took longer than {_limit:g} s; give it more time with --limit, or leave it out")
