"""Processes that die: the driver, workers, nodes, the head."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from capfilt.runs.locking.lock_file import find_lock
from capfilt.storage.atomic import PART

PAUSE = ("--pause", "0.01")


@pytest.mark.parametrize(
    ("sent", "fault"),
    [
        pytest.param(signal.SIGKILL, "SIGKILL of the driver"),
        pytest.param(signal.SIGTERM, "SIGTERM of the driver (a preemption)", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "Ctrl-C", marks=pytest.mark.slow),
    ],
)
def test_the_driver_ends(nodes: Any, driver: Any, survives: Any, seed: int, sent: signal.Signals, fault: str) -> None:
    survived = survives(fault)
    run = driver("--address", nodes.address, *PAUSE)
    run.start()
    run.reach(random.Random(seed).randrange(1, 36))
    run.send(sent)
    began = time.monotonic()
    code, _, err = run.end()
    assert time.monotonic() - began < 30
    assert code == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[sent], err
    assert run.done() < 40, "it was over before"
    survived(run)


@pytest.mark.parametrize(
    ("sent", "fault"),
    [
        pytest.param(signal.SIGKILL, "SIGKILL of a worker"),
        pytest.param(signal.SIGTERM, "SIGTERM of a worker (a preemption)", marks=pytest.mark.slow),
    ],
)
def test_a_worker_ends(nodes: Any, driver: Any, survives: Any, seed: int, sent: signal.Signals, fault: str) -> None:
    survived = survives(fault)
    chance = random.Random(seed)
    run = driver("--address", nodes.address, *PAUSE)
    run.start()
    run.reach(chance.randrange(1, 30))
    victim = chance.choice(run.workers())
    os.kill(victim, sent)
    if sent == signal.SIGKILL:  # what one leaves that is killed while it writes; on SIGTERM it ends its shard first
        for host in (socket.gethostname(), "elsewhere"):
            (run.out / "ledger/toy" / f"{PART}{host}-{victim}-0").touch()
    code, _, err = run.end()
    assert code == 0, err
    assert victim not in run.workers()
    assert list(run.out.rglob(f"{PART}*")) == []
    survived(run)


def test_another_driver_takes_over(nodes: Any, driver: Any, survives: Any, seed: int) -> None:
    """The loser was started to ignore and block every signal; it and its workers write nothing more."""
    survived = survives("another driver that takes the lock over")
    run = driver("--address", nodes.address, *PAUSE)
    run.start()
    run.reach(random.Random(seed).randrange(1, 30))
    result = find_lock(run.out)
    assert result is not None
    assert result.owner is not None
    winner = replace(result.owner, token="winner", pid=2**30, born="1")
    (run.out / f"lock-{result.number + 1}.json").write_text(f"{json.dumps(asdict(winner))}\n")
    time.sleep(0.05)  # what was between its look at the lock and its rename
    before = snapshot(run.out)
    code, _, err = run.end()
    assert code == 1, err
    assert "taken over" in err.splitlines()[-1]
    assert snapshot(run.out) == before
    survived(run)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file that is whole, without locks, whose heartbeat goes on."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith((PART, "lock-"))]
    return {str(path): path.read_bytes() for path in files}


def test_a_node_is_lost(nodes: Any, driver: Any, survives: Any, seed: int) -> None:
    survived = survives("SIGKILL of a raylet (a node lost)")
    run = driver("--address", nodes.address, *PAUSE)
    run.start()
    run.reach(random.Random(seed).randrange(1, 30))
    nodes.lose()
    code, _, err = run.end()
    assert code == 0, err
    survived(run)


@pytest.mark.slow
def test_the_head_is_lost_and_started_again(nodes: Any, driver: Any, survives: Any, seed: int) -> None:
    survived = survives("SIGKILL of the head, and a restart")
    run = driver("--address", nodes.address, "--pause", "0.04")
    run.start()
    run.reach(random.Random(seed).randrange(1, 25))
    nodes.kill_head()
    code, _, _ = run.end()
    assert code != 0, "it went on without its head"
    run.words[run.words.index("--address") + 1] = nodes.address
    survived(run)
