from __future__ import annotations

import pytest

from capfilt.cluster.failures import Failure
from capfilt.errors import ClusterError, DataError


def test_a_capfilt_error_keeps_its_class_and_others_become_cluster_errors() -> None:
    user_error = Failure.of_exception(DataError("a torn tar")).to_exception("annotate")
    assert type(user_error) is DataError
    assert str(user_error) == "a torn tar"
    other = Failure.of_exception(KeyError("x")).to_exception("annotate")
    assert type(other) is ClusterError
    assert str(other) == "annotate: KeyError: 'x'"
    assert "KeyError" in other.__notes__[0]


@pytest.mark.parametrize(
    ("message", "machine_fault"),
    [
        ("The actor died because its node has died. Node Id: 0a", True),
        ("Its worker process has died.\n Worker exit detail: The process receives\n a SIGTERM.", True),
        ("Worker exit type: SYSTEM_ERROR Worker exit detail: End of file.", False),
    ],
)
def test_a_lost_or_preempted_node_is_a_machine_fault(message: str, machine_fault: bool) -> None:
    failure = Failure.of_death(RuntimeError(message))
    assert failure.died
    assert failure.machine_fault is machine_fault
