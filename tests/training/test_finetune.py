"""Fine-tunings for downstream tasks, end to end in this process: from a base alone, on any family, cut and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from capfilt.data.loading.config import Source
from capfilt.inference.device import Compute
from capfilt.models import architecture_of, build
from capfilt.models.checkpoints import store
from capfilt.models.heads.config import ClassifierConfig
from capfilt.training.config import TrainConfig
from capfilt.training.job import TrainJob
from capfilt.training.loop import train

LABELS = ("entailment", "neutral", "contradiction")


def job(out: Path, shards: Path, base: str, objectives: dict[str, Any], **job: Any) -> TrainJob:
    settings = {
        "steps": 2,
        "loader": {"batch_size": 4, "max_length": 16, "shuffle": 8},
        "objectives": objectives,
        "precision": "fp32",
        "log_every": 1,
    }
    given = {"architecture": ClassifierConfig.model_validate({"base": base, "labels": LABELS}), **job}
    return TrainJob(
        out=out,
        tokenizer="world",
        sources=(Source(shards=str(shards)),),
        train=TrainConfig.model_validate(settings),
        compute=Compute(device="cpu", precision="fp32"),
        **given,
    )


@pytest.mark.parametrize("family", ["blip", "albef", "vilt", "vlmo", "xvlm"])
def test_entailment_from_a_base_alone(family: str, task_shards: Path, tmp_path: Path) -> None:
    base = build(architecture_of(f"{family}/tiny"))
    store.save(base, tmp_path / "base")
    training = job(tmp_path / "run", task_shards, f"{family}/tiny", {"task": "entailment"}, start=tmp_path / "base")
    train(training)
    lines = [json.loads(line) for line in (training.out / "log.jsonl").read_text().splitlines()]
    assert [line["outside"] for line in lines] == [0, 0]
    assert all(0 < line["answer"] < 10 for line in lines)
    trained = store.load(training.model_folder)
    assert trained.config == training.architecture
    untouched = dict(base.named_parameters())
    moved = {name for name, p in trained.base.named_parameters() if not p.equal(untouched[name])}
    assert any("vision" in name or "blocks" in name for name in moved), "the whole base is trained"
