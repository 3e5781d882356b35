from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FEW = {"data.world.task_train": 12, "data.world.task_test": 8}
TRAINING = "{steps: 3, loader: {batch_size: 8, max_length: 24, shuffle: 16}, objectives: {queue: 0}, log_every: 1}"


def with_tasks(*tasks: str) -> list[str]:
    settings = {**FEW, "evaluate.tasks": f"[{', '.join(tasks)}]"}
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def test_a_finished_run_may_be_given_tasks_and_does_nothing_else(
    run_copy: Path, finished_run: Path, model_yaml: Path, capfilt: Callable[..., Any], snapshot: Callable[[Path], Any]
) -> None:
    mine, before = finished_run.parent / "mine.yaml", snapshot(run_copy)
    trained = f"{{task: retrieval, finetune: {{model: {model_yaml}, train: {TRAINING}}}}}"
    command = ("bootstrap", mine, "--out", run_copy, *with_tasks(trained, "classification"))
    done = capfilt(*command)
    assert done.code == 0, done.err
    for entry in json.loads((run_copy / "summary.json").read_text())["rounds"]:
        assert 0 <= entry["tasks"]["retrieval"]["tr@1"] <= 100
        assert 0 <= entry["tasks"]["classification"]["top1"] <= 100
        assert entry["tasks"]["classification"]["guessing"] == pytest.approx(100 / 30)
    assert "Downstream tasks by round" in done.out
    assert "zero-shot top-1" in (run_copy / "report.html").read_text()
    after = snapshot(run_copy)
    changed = {name for name, stat in before.items() if after[name] != stat}
    assert changed <= {"summary.json", "report.html", "plan.json", "recipe.yaml"}
    added = {Path(name).parts[:3] for name in after.keys() - before.keys()}
    assert {("round-0", "task-retrieval", "finetune"), ("round-1", "task-classification", "metrics.json")} <= added
    assert {name for name in after if name.startswith("data/") and name not in before} == {
        f"data/{name}"
        for name in (
            "ledger/world/classification-test.json",
            *(f"classification-test/{name}" for name in ("00000.tar", "sizes.json", "classes.txt", "templates.txt")),
        )
    }
    again = capfilt(*command)
    assert again.code == 0, again.err
    assert snapshot(run_copy) == after
    assert capfilt("verify", run_copy, address=None).code == 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("evaluate.tasks=[retrievl]", "evaluate.tasks.0 (retrievl): there is no such task"),
        ("evaluate.tasks=[grounding]", "xvlm can. As it is, it can: {task: grounding}."),
        ("evaluate.tasks=[classification, classification]", "the task comes twice"),
        ("evaluate.tasks=[{task: entailment}]", "evaluate.tasks.0 (entailment)"),
        ("evaluate.tasks=[{task: entailment, finetune: {extends: entailment-tiny, data: x}}]", "found data"),
        ("evaluate.tasks=[{task: retrieval, finetune: {model: clip/tiny, train: {steps: 1}}}]", "of the family clip"),
    ],
)
def test_tasks_that_cannot_be_are_refused_before_anything_is_written(
    settings: str, said: str, capfilt: Callable[..., Any]
) -> None:
    done = capfilt("show", "demo", "--set", settings, address=None)
    assert done.code == 2
    assert said in done.line
