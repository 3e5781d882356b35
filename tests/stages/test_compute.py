"""Where a command computes and in which format: chosen once, kept in the plan, taken over by forks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from capfilt.cluster.session import Session
from capfilt.cluster.worker_pool import Resources
from capfilt.errors import RunError
from capfilt.inference.config import Precision
from capfilt.inference.device import Ability, Compute
from capfilt.runs.locking import lock
from capfilt.runs.progress import Progress
from capfilt.runs.run import Run, fork
from capfilt.stages import compute as module
from capfilt.stages.compute import ComputeRequest, decide

FAST, SLOW = Ability("cuda", "H100 on a", bf16=True), Ability("cuda", "T4 on b", bf16=False)


@pytest.fixture(autouse=True)
def let_go() -> Iterator[None]:
    yield
    lock.release_all()


class Cluster:
    """Answers for the nodes of a cluster, and counts how often it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *nodes: Ability):
        self.nodes, self.asked = list(nodes), 0
        monkeypatch.setattr(module, "run_on_nodes", self._ask)

    def _ask(self, session: Session, question: object, cpus: float, gpus: float) -> list[Ability]:
        self.asked += 1
        return self.nodes


def stage(precision: Precision = "auto", gpus: float = 1, training: bool = False) -> ComputeRequest:
    return ComputeRequest(precision, Resources(gpus=gpus), training)


def chosen(run: Run, wanted: ComputeRequest, session: Session | None = None) -> Compute:
    return decide(session or Session("auto"), run, {"annotate": wanted}, Progress(quiet=True))["annotate"]


def test_a_choice_is_made_once_and_said_where_nodes_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = Cluster(monkeypatch, FAST, SLOW)
    run = Run.open(tmp_path / "run", "", {"verb": "annotate"})
    stages = {"annotate": stage(), "pretrain": stage(training=True), "select": stage(gpus=0)}
    found = decide(Session("auto"), run, stages, Progress())
    assert found == {
        "annotate": Compute(device="cuda", precision="fp32"),
        "pretrain": Compute(device="cuda", precision="fp32"),
        "select": Compute(device="cpu", precision="fp32"),
    }
    assert nodes.asked == 1, "nodes are asked once for a size of worker"
    said = [line for line in capsys.readouterr().err.splitlines() if line]
    assert said[0] == "annotate: fp32, since 1 of 2 nodes (first T4 on b) have no bf16 units and all take the same"
    plan = json.loads((tmp_path / "run/plan.json").read_bytes())
    assert plan["decided"]["annotate"] == {"device": "cuda", "precision": "fp32"}
    assert plan["decided"]["pretrain"] == {"precision": "fp32"}
    nodes.nodes = [FAST]  # the slow one has gone; what began in fp32 goes on in fp32
    again = Run.open(tmp_path / "run", "", {"verb": "annotate"})
    assert chosen(again, stage()).precision == "fp32"
    assert nodes.asked == 1


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (stage(gpus=0), "annotate began in bf16 on cuda, and is now requested in auto on cpu"),
        (stage("fp32"), "annotate began in bf16 on cuda, and is now requested in fp32 on cuda"),
    ],
)
def test_another_device_or_format_is_refused_and_a_fork_begins_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: ComputeRequest, said: str
) -> None:
    Cluster(monkeypatch, FAST)
    plan = {"verb": "annotate"}
    assert chosen(Run.open(tmp_path / "old", "", plan), stage()).precision == "bf16"
    with pytest.raises(RunError, match=said) as caught:
        chosen(Run.open(tmp_path / "old", "", plan), wanted)
    assert "\n" not in str(caught.value)
    assert "--fork NEW_OUT" in str(caught.value)
    new = Run.open(fork(tmp_path / "old", tmp_path / "new"), "", plan)
    assert chosen(new, wanted).precision == "fp32"


def test_a_fork_takes_over_the_choice_and_a_training_may_move_to_another_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = Cluster(monkeypatch, FAST, SLOW)
    plan: dict[str, Any] = {"verb": "annotate"}
    chosen(Run.open(tmp_path / "old", "", plan), stage())
    nodes.nodes = [FAST]
    new = Run.open(fork(tmp_path / "old", tmp_path / "new"), "", plan)
    assert chosen(new, stage()).precision == "fp32", "or everything would be done again"
    run = Run.open(tmp_path / "training", "", plan)
    assert chosen(run, stage(training=True)) == Compute(device="cuda", precision="bf16")
    assert chosen(run, stage(gpus=0, training=True)) == Compute(device="cpu", precision="bf16")
    with pytest.raises(RunError, match="began in bf16"):
        chosen(run, stage("fp32", training=True))


def test_a_lone_process_answers_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "local_device", lambda: "cuda")
    monkeypatch.setattr(module, "ability", lambda: SLOW)
    run = Run.open(tmp_path / "run", "", {})
    assert chosen(run, stage(gpus=0), Session("local")) == Compute(device="cuda", precision="fp32")
