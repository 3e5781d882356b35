"""A model in float64 has its losses in float64, from end to end: whoever compares with other code sees nothing of ours
rounded to fp32."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from capfilt.objectives.config import ObjectivesConfig
from capfilt.objectives.draws import GivenDraws
from capfilt.objectives.interface import PairBatch, Task
from capfilt.objectives.tasks import build_task

B = 4
GIVEN = {"wrong_images": torch.tensor([1, 2, 3, 0]), "wrong_texts": torch.tensor([2, 3, 1, 1])}


@pytest.fixture
def batch() -> PairBatch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 190, (B, 6), generator=generator)
    ids[2, 4:] = 0
    images = torch.randn(B, 3, 16, 16, generator=generator, dtype=torch.double)
    return PairBatch(images, ids, (ids != 0).long(), torch.arange(B))


def in_float64(model: Any, **options: Any) -> Task:
    torch.manual_seed(0)
    task = build_task(model, ObjectivesConfig(momentum=1.0, **options)).double().train()
    task.draws = GivenDraws(**GIVEN)
    return task


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("mean_over", ["rank", "all"])
def test_a_nudge_moves_blip_s_loss_by_the_gradient(
    small_blip: Callable[..., Any], batch: PairBatch, mean_over: str, chunks: int
) -> None:
    task = in_float64(small_blip(), queue=8, mean_over=mean_over)
    nudge_moves_the_loss_by_the_gradient(task, batch, chunks)


def test_a_nudge_moves_the_first_stage_s_loss_by_the_gradient(
    small_blip2: Callable[..., Any], batch: PairBatch
) -> None:
    nudge_moves_the_loss_by_the_gradient(in_float64(small_blip2(), queue=0, mean_over="all"), batch)


@pytest.mark.parametrize("language", ["opt", "t5"])
def test_the_second_stage_s_loss_is_one(small_blip2: Callable[..., Any], batch: PairBatch, language: str) -> None:
    task = in_float64(small_blip2(language), losses={"lm": 1.0}, queue=0, smoothing=0.0)
    whole, _ = task.compute_losses(batch, 0.0)
    cut, _ = task.backward_in_chunks(batch, 0.0, 2, contextlib.nullcontext)
    assert whole["lm"].dtype == cut["lm"].dtype == torch.float64
    torch.testing.assert_close(cut["lm"], whole["lm"].detach(), atol=1e-6, rtol=0)  # transformers' own fp32


def nudge_moves_the_loss_by_the_gradient(task: Task, batch: PairBatch, chunks: int = 1) -> None:
    """To six digits: what fp32 in any place would leave at none, and a central difference can tell."""
    task.alpha = 0.0  # soft targets are taken for constants, and move with the temperature all the same
    trained = [p for p in task.parameters() if p.requires_grad]
    queues = {name: x.clone() for name, x in task.state_dict().items() if "queue" in name or "pointer" in name}

    def loss_at(ways: list[torch.Tensor], far: float) -> float:
        task.zero_grad()
        task.load_state_dict(queues, strict=False)
        move(trained, ways, far)
        if chunks > 1:
            losses, _ = task.backward_in_chunks(batch, 0.02, chunks, contextlib.nullcontext)
        else:
            losses, _ = task(batch, 0.02)
            task.total(losses).backward()
        move(trained, ways, -far)
        assert {name: loss.dtype for name, loss in losses.items()} == dict.fromkeys(losses, torch.float64)
        return task.total(losses).item()

    loss_at([], 0.0)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained]
    norm = float(torch.stack([g.square().sum() for g in gradients]).sum().sqrt())
    ways = [g / norm for g in gradients]
    moved = (loss_at(ways, 1e-5) - loss_at(ways, -1e-5)) / 2e-5
    assert moved == pytest.approx(norm, rel=1e-6)


@torch.no_grad()
def move(weights: list[torch.nn.Parameter], ways: list[torch.Tensor], far: float) -> None:
    for p, way in zip(weights, ways, strict=bool(ways)):
        p += far * way
