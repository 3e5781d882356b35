"""Waits of the host and kernels of what is done a million times, beside `ceilings.yaml`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from gpus import PRETEND, Waits

from capfilt.data.loading.config import LoaderConfig, Source
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.inference.batches import Images
from capfilt.inference.config import DecodeConfig
from capfilt.inference.device import Compute, autocast
from capfilt.inference.filters.fusion import FusionFilter
from capfilt.inference.generation.decode import generate, uniforms
from capfilt.inference.generation.fused import FusedSteps
from capfilt.inference.local_model import LocalModel
from capfilt.models import Blip
from capfilt.objectives.config import ObjectivesConfig
from capfilt.training.config import OptimizerConfig, TrainConfig
from capfilt.training.job import TrainJob
from capfilt.training.loop import train

MakeBlip = Callable[..., Blip]
CEILINGS = yaml.safe_load(Path(__file__).with_name("ceilings.yaml").read_text())
DEPTH = 12
ROWS = 64


class Count(NamedTuple):
    """Waits of the host by their lines, and kernels, which the pretend GPU alone counts."""

    waits: Counter[str]
    kernels: Counter[str] | None

    def __sub__(self, other: Count) -> Count:
        more = Counter(self.kernels)
        more.subtract(other.kernels or {})
        return Count(self.waits - other.waits, None if self.kernels is None else +more)

    def check(self, name: str) -> None:
        """Fail where there are more than the ceiling of this name says, or far fewer kernels."""
        most = CEILINGS[name]
        lines = "\n".join(f"{count} x {line}" for line, count in self.waits.most_common())
        assert self.waits.total() <= most["waits"], f"{name}: {self.waits.total()} waits\n{lines}"
        if self.kernels is not None:
            kernels = self.kernels.total()
            said = f"{name}: {kernels} kernels, {self.kernels.most_common()}"
            assert 0.8 * most["kernels"] <= kernels <= most["kernels"], said


@pytest.fixture
def count(waits: Waits, pytestconfig: pytest.Config) -> Callable[[Callable[[], object]], Count]:
    """Counts what is done."""

    def done(work: Callable[[], object]) -> Count:
        with waits() as found:
            work()
        if not pytestconfig.pluginmanager.has_plugin(PRETEND):
            return Count(Counter(found), None)
        from pretend_gpu.tensors import RECORD

        return Count(Counter(found), Counter(RECORD.kernels))

    return done


@torch.inference_mode()
def test_eight_decode_steps(small_blip: MakeBlip, cuda: torch.device, count: Any) -> None:
    """Nucleus sampling in bf16, with the look at which texts have ended."""
    model = small_blip(depth=DEPTH, roles=("decoder",)).to(cuda)
    image = model.image_context(model.encode_image(torch.randn(ROWS, 3, 16, 16).to(cuda)), "decoder")
    draws = torch.from_numpy(np.stack([uniforms(0, 0, f"{i}", 0, 40) for i in range(ROWS)])).to(cuda)

    def write(steps: int) -> None:
        config = DecodeConfig(min_length=steps, max_length=steps + 1)
        with autocast(cuda, torch.bfloat16):
            generate(model, image, [1], 3, config, draws, None, FusedSteps.of(model))

    few, more = count(lambda: write(8)), count(lambda: write(16))
    (more - few).check("eight decode steps")


def test_a_scoring_batch(small_blip: MakeBlip, cuda: torch.device, count: Any) -> None:
    """Two texts of each picture, by itm and itc, image tokens not counted."""
    local = LocalModel(small_blip(depth=DEPTH, roles=("encoder",)).to(cuda), Tokenizer.load("world"))
    score = FusionFilter(local, 35)
    images = Images({local.image_format: torch.randn(ROWS, 3, 16, 16).to(cuda)})
    score.prepare(images)
    texts = [["a red circle", f"a tan ring and {i} balls"] for i in range(ROWS)]
    count(lambda: score.score(images, texts)).check("a scoring batch")


def test_a_training_step(
    small_blip: MakeBlip, small_world: Path, cuda: torch.device, tmp_path: Path, count: Any
) -> None:
    """Of a whole training, between logs and states."""

    def training(steps: int) -> None:
        job = TrainJob(
            out=tmp_path / f"{steps}",
            architecture=small_blip(depth=DEPTH).config,
            tokenizer="world",
            sources=(Source(shards=str(small_world / "human")),),
            train=TrainConfig(
                steps=steps,
                loader=LoaderConfig(batch_size=8, max_length=24, shuffle=32),
                objectives=ObjectivesConfig(queue=16),
                optimizer=OptimizerConfig(lr=1e-3),
                precision="fp32",
                log_every=100,
            ),
            compute=Compute(device="cuda", precision="fp32"),
        )
        train(job)

    fewer = count(lambda: training(3))  # first: what a process does once is not of a step
    (count(lambda: training(4)) - fewer).check("a training step")
