from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from capfilt.models.checkpoints import store


def test_a_recipe_starts_from_a_pretrained_model_and_counts_its_answers(
    finished_run: Path, task_shards: Path, tmp_path: Path, capfilt: Any, snapshot: Any
) -> None:
    few = ["train.steps=2", "train.loader.batch_size=4", "train.objectives.min_answers=1", f"data={task_shards}"]
    start = f"start={finished_run}/round-0/pretrain"
    sets = [word for setting in (*few, start) for word in ("--set", setting)]
    model = ["--set", f"model={{extends: {finished_run}/round-0/pretrain/checkpoint/architecture.yaml, answers: true}}"]
    model += ["--set", "model.text.share=none"]
    words = ["finetune", "vqa-tiny", "--out", tmp_path / "run", "--address", "local", *sets, *model]
    done = capfilt(*words, "--json")
    assert done.code == 0, done.err
    trained = store.architecture(Path(json.loads(done.out)["model"]))
    assert trained.known_answers is not None
    assert len(trained.known_answers) >= 2
    before = snapshot(tmp_path / "run")
    assert capfilt(*words).code == 0
    assert snapshot(tmp_path / "run") == before


def test_what_a_task_cannot_be_trained_on_is_said_before_anything_is_loaded(
    finished_run: Path, tmp_path: Path, capfilt: Any
) -> None:
    words = ["finetune", "entailment-tiny", "--out", tmp_path / "run", "--address", "local"]
    done = capfilt(*words, "--set", "model.base=clip/tiny", "--set", f"data={finished_run}/data/human")
    assert done.code == 2
    assert "the family clip cannot do entailment: blip, albef, vilt, vlmo and xvlm can" in done.line
    done = capfilt(*words, "--set", "train.loader.batch_size=4", "--set", f"data={finished_run}/data/human")
    assert done.code == 1
    assert "has hypotheses with an answer" in done.line
