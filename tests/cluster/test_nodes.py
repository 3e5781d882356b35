from __future__ import annotations

import os
import signal

import pytest

from capfilt.cluster import nodes
from capfilt.cluster.nodes import run_on_nodes
from capfilt.cluster.session import Session


def pid() -> int:
    return os.getpid()


def for_ever() -> None:
    signal.pause()


def test_a_process_of_each_node_with_room_answers(ray_session: Session) -> None:
    (other,) = run_on_nodes(ray_session, pid, cpus=1, gpus=0)
    assert other != pid()
    assert run_on_nodes(ray_session, pid, cpus=64, gpus=0) == []
    assert run_on_nodes(ray_session, pid, cpus=1, gpus=1) == []


def test_a_node_that_does_not_answer_is_left_out(ray_session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "TIMEOUT", 0.1)
    assert run_on_nodes(ray_session, for_ever, cpus=1, gpus=0) == []
