"""The time that one item of work may take in this process, checked by the code that reads its input.

It uses no signal and no second thread, so nothing is cut in the middle of a write. It cannot end a single call that
never returns: a read that the storage does not answer, one step of a model. On Ray the driver ends those, by ending
their process.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from capfilt.errors import TimeLimitError

_ends: float = float("inf")
_limit: float = 0.0


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Have `check` raise after so many seconds of this block; 0 = never. In nested blocks the earlier end counts."""
    global _ends, _limit
    before = _ends, _limit
    if seconds and (ends := time.monotonic() + seconds) < _ends:
        _ends, _limit = ends, seconds
    try:
        yield
    finally:
        _ends, _limit = before


def check() -> None:
    """Raise TimeLimitError if the time is over."""
    if time.monotonic() > _ends:
        raise TimeLimitError(f"took longer than {_limit:g} s; give it more time with --limit, or leave it out")
