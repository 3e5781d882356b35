from __future__ import annotations

import threading

import pytest
import torch

from capfilt.inference.timer import StageTimer, timed

CPU = torch.device("cpu")


def test_stages_add_up_across_threads() -> None:
    clock, together = StageTimer(CPU), threading.Barrier(3)

    def work() -> None:
        with timed(clock, "decode"):
            together.wait()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    with timed(clock, "read"):
        together.wait()
    for thread in threads:
        thread.join()
    assert set(clock.seconds) == {"decode", "read"}
    assert clock.seconds["decode"] > 0


def test_a_stage_that_fails_is_counted_and_fails() -> None:
    clock = StageTimer(CPU)
    with pytest.raises(ZeroDivisionError), clock.stage("score"):
        raise ZeroDivisionError
    assert "score" in clock.seconds


def test_without_a_clock_nothing_is_measured() -> None:
    with timed(None, "read") as nothing:
        assert nothing is None
