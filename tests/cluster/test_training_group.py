from __future__ import annotations

import threading

from capfilt.cluster.failures import Failure
from capfilt.cluster.training_group import TrainingGroup

SIZE = {"workers": 1, "cpus": 1, "gpus": 0}


def test_a_training_whose_processes_ended_before_it_is_tried_again_and_not_done() -> None:
    """For instance because a group of another size was wanted in that moment."""
    group = TrainingGroup(SIZE, lambda: None)
    failure = group.train(print, {})
    assert failure is not None
    assert failure.died


def test_a_training_is_done_when_its_last_process_says_so_and_a_failure_is_its_own() -> None:
    begins, ends, failed = threading.Event(), threading.Event(), Failure("killed", died=True)

    def run() -> Failure:
        assert begins.wait(60)
        assert group.training(0) == (print, {})
        group.done(0, 1)
        assert ends.wait(60)
        return failed

    group = TrainingGroup(SIZE, run)
    begins.set()
    assert group.train(print, {}) is None
    ends.set()
    assert group.train(print, {}) is failed
    assert not group.alive
