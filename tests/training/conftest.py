from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capfilt.data.loading.config import LoaderConfig, Source
from capfilt.inference.device import Compute
from capfilt.models import Blip
from capfilt.objectives.config import ObjectivesConfig
from capfilt.training.config import OptimizerConfig, TrainConfig
from capfilt.training.job import TrainJob


@pytest.fixture(scope="session")
def make_job(small_blip: Callable[..., Blip], small_world: Path) -> Callable[..., TrainJob]:
    """Makes a training of a small BLIP on the small world, with dropout; settings of `train` by keyword."""

    def make(out: Path, text: dict[str, Any] | None = None, **train: Any) -> TrainJob:
        options = {
            "steps": 4,
            "loader": LoaderConfig(batch_size=8, max_length=24, shuffle=32),
            "objectives": ObjectivesConfig(queue=16, momentum=0.9),
            "optimizer": OptimizerConfig(lr=1e-3),
            "precision": "fp32",
            "log_every": 1,
        }
        architecture = small_blip(**{"dropout": 0.1, **(text or {})}).config
        deep = architecture.vision.model_copy(update={"drop_path": 0.1 if text is None else 0.0})
        return TrainJob(
            out=out,
            architecture=architecture.model_copy(update={"vision": deep}),
            tokenizer="world",
            sources=(Source(shards=str(small_world / "human")),),
            train=(settings := TrainConfig(**{**options, **train})),
            compute=Compute(device="cpu", precision="bf16" if settings.precision == "bf16" else "fp32"),
        )

    return make
