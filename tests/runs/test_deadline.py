from __future__ import annotations

import time

import pytest

from capfilt.errors import TimeLimitError
from capfilt.runs import deadline


def test_work_ends_where_its_time_is_over() -> None:
    deadline.check()
    with deadline.time_limit(0):
        deadline.check()
    with deadline.time_limit(0.01):
        time.sleep(0.02)
        with pytest.raises(TimeLimitError, match=r"took longer than 0\.01 s"):
            deadline.check()
        with deadline.time_limit(60), pytest.raises(TimeLimitError, match=r"0\.01 s"):
            deadline.check()  # the sooner one holds
    deadline.check()


def test_a_limit_within_a_limit_goes_with_its_block() -> None:
    with deadline.time_limit(60):
        with deadline.time_limit(0.01):
            time.sleep(0.02)
            with pytest.raises(TimeLimitError, match=r"0\.01 s"):
                deadline.check()
        deadline.check()
