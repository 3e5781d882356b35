"""Trainings from their first picture to the saved model on a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from capfilt.data.loading.config import LoaderConfig, Source
from capfilt.data.loading.loader import Batch, Loader
from capfilt.inference.config import DeviceKind
from capfilt.inference.device import Compute
from capfilt.objectives.config import ObjectivesConfig
from capfilt.training import loop
from capfilt.training.config import ExecutionConfig, OptimizerConfig, TrainConfig
from capfilt.training.job import TrainJob

MakeJob = Callable[..., TrainJob]


@pytest.fixture
def make_job(small_blip: Callable[..., Any], small_world: Path) -> MakeJob:
    """Makes a training of a small BLIP on the small world; settings of `train` by keyword."""

    def make(out: Path, device: DeviceKind = "cuda", deterministic: bool = True, **train: Any) -> TrainJob:
        options = {
            "steps": 6,
            "loader": LoaderConfig(batch_size=8, max_length=24, shuffle=32),
            "objectives": ObjectivesConfig(queue=16, momentum=0.9),
            "optimizer": OptimizerConfig(lr=1e-3),
            "precision": "fp32",
            "log_every": 1,
        }
        return TrainJob(
            out=out,
            architecture=small_blip().config,
            tokenizer="world",
            sources=(Source(shards=str(small_world / "human")),),
            train=TrainConfig(**{**options, **train}),
            compute=Compute(device=device, precision="fp32"),
            execution=ExecutionConfig(deterministic=deterministic),
        )

    return make


def curve(job: TrainJob) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (job.out / "log.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in ("itc", "itm", "lm", "grad_norm")} for line in lines]


def weights(job: TrainJob) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(job.model_folder / "model.safetensors")


class Killed(Exception):
    """Stands for the end of the process."""


def test_a_training_that_was_killed_and_resumed_ends_with_the_same_weights(
    make_job: MakeJob, cuda: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `resources.deterministic`, which a real GPU needs for it."""
    whole, cut = (make_job(tmp_path / name, checkpoint_every=2) for name in ("whole", "cut"))
    loop.train(whole)

    class Dying(Loader):
        def batches(self, start: int = 0) -> Iterator[Batch]:
            for step, batch in enumerate(super().batches(start), start):
                if step == 5:
                    raise Killed
                yield batch

    with monkeypatch.context() as dying:
        dying.setattr(loop, "loader_of", lambda kind, *given, **options: Dying(*given, **options))
        with pytest.raises(Killed):
            loop.train(cut)
    loop.train(cut)
    assert '"resumed": 4' in (cut.out / "log.jsonl").read_text(), "not from the beginning"
    resumed = weights(cut)
    assert all(torch.equal(value, resumed[name]) for name, value in weights(whole).items())


def test_losses_fall_and_are_near_those_of_a_cpu(
    make_job: MakeJob, cuda: torch.device, pretend_gpu: Any, tmp_path: Path
) -> None:
    """On a real GPU another generator draws the negatives."""
    jobs = [make_job(tmp_path / device, device=device, deterministic=False) for device in ("cpu", "cuda")]
    for job in jobs:
        loop.train(job)
    on_cpu, on_gpu = map(curve, jobs)
    assert on_gpu == [pytest.approx(line, rel=2e-3) for line in on_cpu]
    assert on_gpu[-1]["lm"] < on_gpu[0]["lm"]
