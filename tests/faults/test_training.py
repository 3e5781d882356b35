"""Trainings of two ranks whose processes die: a rank, the node of a rank, the driver."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from capfilt import config as configs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS, EVERY = 60, 10
PATIENCE = 400  # seconds for a driver, on a machine that does other things, too


@dataclass
class Training:
    """A driver of `capfilt pretrain`, in a process of its own."""

    out: Path
    words: list[str]
    environment: dict[str, str]
    process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Begin, or begin again."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "capfilt", "pretrain", "blip-tiny", "--out", str(self.out), *self.words],
            env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def end(self) -> tuple[int, str]:
        """Wait for it; its exit code and what it said."""
        assert self.process is not None
        _, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, err

    def finish(self) -> None:
        """Run it to its end."""
        self.start()
        code, err = self.end()
        assert code == 0, err

    def step(self) -> int:
        """The newest step in its log."""
        log = self.out / "pretrain/log.jsonl"
        written = log.read_bytes() if log.exists() else b""
        lines = [line for line in written.splitlines(keepends=True) if line.endswith(b"}\n")]
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def saved(self) -> int:
        """The newest state on disk."""
        states = (self.out / "pretrain/states").glob("*/state.json")
        return max((int(path.parent.name) for path in states), default=0)

    def reach(self, step: int) -> None:
        """Wait until so many steps are logged."""
        assert self.process is not None
        give_up = time.monotonic() + PATIENCE
        while self.step() < step:
            assert self.process.poll() is None, f"it ended before: {self.process.communicate()}"
            assert time.monotonic() < give_up, f"{self.step()} of {step} steps"
            time.sleep(0.002)

    def weights(self) -> bytes:
        return (self.out / "pretrain/checkpoint/model.safetensors").read_bytes()


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return 0


def ranks_of(nodes: Any) -> dict[int, Any]:
    """The training processes that run now, each with its node of the cluster."""
    cluster = nodes.cluster
    raylets = {node.all_processes["raylet"][0].process.pid: node for node in (cluster.head_node, *nodes.lost)}
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or parent(int(entry.name)) not in raylets:
            continue
        try:
            name = (entry / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if b"RayTrainWorker" in name:
            found[int(entry.name)] = raylets[parent(int(entry.name))]
    return found


@pytest.fixture(scope="session")
def recipe(small_blip: Callable[..., Any], small_world: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """60 steps of a small BLIP with dropout on the small world, a state every 10."""
    model = tmp_path_factory.mktemp("model") / "small.yaml"
    model.write_text(configs.to_yaml(small_blip(dropout=0.1, init_std=0.1).config))
    settings = {
        "model": model, "data": small_world / "human", "resources.workers": 2,
        "train.steps": STEPS, "train.checkpoint_every": EVERY, "train.log_every": 1, "train.loader.batch_size": 32,
    }  # fmt: skip
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


@pytest.fixture(scope="session")
def calm(nodes: Any, recipe: list[str], environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of a training that nothing happened to."""
    words = [*recipe, "--address", nodes.address]
    run = Training(tmp_path_factory.mktemp("calm") / "run", words, environment)
    run.finish()
    return run.weights()


@pytest.mark.parametrize("hit", ["a rank", "the node of a rank", "the driver"])
def test_a_training_ends_with_the_same_weights(
    nodes: Any,
    recipe: list[str],
    environment: dict[str, str],
    calm: bytes,
    trainings: Any,
    tmp_path: Path,
    seed: int,
    hit: str,
) -> None:
    row = trainings.begin(f"SIGKILL of {hit}")
    chance = random.Random(seed)
    run = Training(tmp_path / "run", [*recipe, "--address", nodes.address], environment)
    run.start()
    run.reach(chance.randrange(1, STEPS - 5))
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
    assert lost <= 2 * EVERY
