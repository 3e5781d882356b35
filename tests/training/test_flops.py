from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from capfilt.models import Blip, Blip2
from capfilt.objectives.config import ObjectivesConfig
from capfilt.objectives.interface import PairBatch
from capfilt.objectives.tasks import build_task
from capfilt.training import flops as speed
from capfilt.training.flops import Speed, peak_flops, step_flops
from capfilt.training.job import TrainJob
from capfilt.training.loop import train

PAIRS, TOKENS = 6, 9


@pytest.mark.parametrize("family", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("blip", "blip2")), "opt"])
def test_what_is_counted_is_what_a_real_step_does(
    small_blip: Callable[..., Blip], small_blip2: Callable[..., Blip2], family: str
) -> None:
    model: Any = small_blip() if family == "blip" else small_blip2(family.removeprefix("blip2"))
    config = ObjectivesConfig(
        queue=12 if family == "blip" else 0, **({"losses": {"lm": 1.0}} if family == "opt" else {})
    )
    ids = torch.randint(4, 190, (PAIRS, TOKENS))
    learner = build_task(model, config).train()
    batch = PairBatch(torch.randn(PAIRS, 3, 16, 16), ids, torch.ones_like(ids), torch.arange(PAIRS))
    # Of the CPU's fused attention torch's counter knows nothing.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        losses, _ = learner(batch, 0.5)
        learner.total(losses).backward()
    assert step_flops(model.config, config, PAIRS, TOKENS) == counter.get_total_flops() > 0


@pytest.mark.slow
def test_counting_exchanges_nothing_with_other_ranks(small_blip2: Callable[..., Blip2]) -> None:
    """NCCL has no way for the tensors of a CPU, which the count is made on."""
    config, objectives = small_blip2("").config, ObjectivesConfig(queue=0)
    wanted = step_flops(config, objectives, PAIRS, TOKENS)
    dist.init_process_group("cuda:fake", rank=0, world_size=2, store=FakeStore())
    try:
        assert step_flops(config, objectives, PAIRS, TOKENS) == wanted
    finally:
        dist.destroy_process_group()


def test_a_step_is_three_forward_passes_of_what_learns(small_blip: Callable[..., Blip]) -> None:
    """By hand: the products of the decoder's LM alone, forward once and backward twice."""
    model = small_blip(roles=("decoder",))
    found = step_flops(model.config, ObjectivesConfig(losses={"lm": 1.0}), PAIRS, TOKENS)
    weights = sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.ndim == 2 and name.startswith("text.layers") and "cross" not in name
    )
    text = 2 * PAIRS * TOKENS * (weights + 16 * 16 + 16 * model.config.text.vocab_size)
    assert found > 3 * text  # and the vision tower, cross-attention and attention itself


@pytest.mark.parametrize(
    ("gpu", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756e12),
        ("NVIDIA A100-SXM4-80GB", torch.float32, 19.5e12),
        ("NVIDIA L40S", torch.bfloat16, 362e12),
        ("NVIDIA L4", torch.bfloat16, 121e12),
        ("NVIDIA A10", torch.bfloat16, 125e12),
        ("NVIDIA A10G", torch.bfloat16, None),
        ("NVIDIA L40", torch.bfloat16, None),
        ("NVIDIA H100 NVL", torch.bfloat16, None),
        ("Some other card", torch.bfloat16, None),
        ("", torch.float32, None),
    ],
)
def test_peaks_go_by_the_name(gpu: str, dtype: torch.dtype, peak: float | None) -> None:
    assert peak_flops(gpu, dtype) == peak


def test_on_a_cpu_there_is_no_utilisation_and_not_a_zero(make_job: Callable[..., TrainJob], tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    job = make_job(tmp_path, steps=2)
    train(job, told.append)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert told == lines
    assert len(lines) == 2
    assert "mfu" not in lines[0]


def test_utilisation_is_flops_by_time_by_peak(
    make_job: Callable[..., TrainJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "peak_flops", lambda gpu, dtype: 1e9)
    job = make_job(tmp_path)
    counted: list[Any] = []
    monkeypatch.setattr(speed, "step_flops", lambda *of: counted.append(of) or 3e8)
    meter = Speed(job, torch.device("cpu"))
    assert meter.metrics(steps=10, seconds=4.0) == {"mfu": pytest.approx(10 * 3e8 / 4.0 / 1e9, abs=1e-4)}
    assert counted == [(job.architecture, job.train.objectives, 8, 24)]
