"""Trainings of two ranks whose processes die: a rank, the node of a rank, the driver."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return 0


def ranks_of(nodes: Any) -> dict[int, Any]:
    """The training processes that run now, each with its node of the cluster."""
    cluster = nodes.cluster
    raylets = {node.all_processes["raylet"][0].process.pid: node for node in (cluster.head_node, *nodes.lost)}
    result = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or parent(int(entry.name)) not in raylets:
            continue
        try:
            name = (entry / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if b"RayTrainWorker" in name:
            result[int(entry.name)] = raylets[parent(int(entry.name))]
    return result


@pytest.fixture(scope="session")
def calm(nodes: Any, training: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of a training that nothing happened to."""
    run = training(tmp_path_factory.mktemp("calm") / "run", "--address", nodes.address)
    run.finish()
    return run.weights()


@pytest.mark.parametrize("hit", ["a rank", "the node of a rank", "the driver"])
def test_a_training_ends_with_the_same_weights(
    nodes: Any,
    training: Callable[..., Any],
    calm: bytes,
    trainings: Any,
    tmp_path: Path,
    seed: int,
    hit: str,
) -> None:
    row = trainings.begin(f"SIGKILL of {hit}")
    chance = random.Random(seed)
    run = training(tmp_path / "run", "--address", nodes.address)
    run.start()
    run.reach(chance.randrange(1, run.steps - 5))
    time.sleep(chance.uniform(0, 0.1))
    assert run.process is not None
    if hit == "the driver":
        run.process.kill()
    else:
        there = ranks_of(nodes)
        victims = [pid for pid, node in there.items() if hit == "a rank" or node in nodes.lost]
        victim = chance.choice(victims)
        if hit == "a rank":
            os.kill(victim, signal.SIGKILL)
        else:
            nodes.lost.remove(there[victim])
            nodes.cluster.remove_node(there[victim], allow_graceful=False)
    lost = run.step() - run.saved()
    code, err = run.end()
    if hit == "the driver":
        assert code == -signal.SIGKILL
        run.finish()
    else:
        assert code == 0, err
    row.survived += 1
    row.most_lost = max(row.most_lost, lost)
    row.equal += run.weights() == calm
    assert run.weights() == calm
    assert lost <= 2 * run.every


def test_a_training_of_two_threads_ends_with_the_same_weights(
    training: Callable[..., Any], environment: dict[str, str], tmp_path: Path, seed: int
) -> None:
    """One process without Ray, killed at a moment that the seed decides; two undisturbed ones beside it, since
    trainings that differ each time may agree once."""
    settings = {
        "model": "blip/tiny", "resources.workers": 1, "resources.deterministic": "true", "train.loader.batch_size": 64,
        "train.objectives.queue": 0, "train.steps": 20, "train.checkpoint_every": 5,
    }  # fmt: skip
    words = ["--address", "local", *(word for key, value in settings.items() for word in ("--set", f"{key}={value}"))]
    threads = {**environment, "OMP_NUM_THREADS": "2"}
    one, two, killed = (
        replace(training(tmp_path / name, *words), environment=threads, steps=20, every=5)
        for name in ("one", "two", "killed")
    )
    one.finish()
    two.finish()
    killed.start()
    killed.reach(random.Random(seed).randrange(1, 15))
    killed.process.kill()
    assert killed.end()[0] == -signal.SIGKILL
    killed.finish()
    assert one.weights() == two.weights() == killed.weights()
