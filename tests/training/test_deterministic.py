"""Trainings with several threads give the same bits each time, and say so where they cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from capfilt.errors import ModelError
from capfilt.models import Blip, Blip2
from capfilt.objectives.config import ObjectivesConfig
from capfilt.objectives.interface import PairBatch
from capfilt.objectives.tasks import build_task
from capfilt.training.config import ExecutionConfig
from capfilt.training.deterministic import deterministic
from capfilt.training.distributed.data_parallel import Gradients

CPU = torch.device("cpu")
ROWS = 192
"""As many as torch needs to share the rows of an image's keys out between threads."""

OBJECTIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "pretraining": ("blip", {}),
    "a filter": ("blip", {"losses": {"itc": 1.0, "itm": 1.0}, "itc_targets": "image", "negatives": "all"}),
    "first stage": ("blip2", {}),
    "second stage, opt": ("opt", {"losses": {"lm": 1.0}, "smoothing": 0.0}),
    "second stage, t5": ("t5", {"losses": {"lm": 1.0}}),
}


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("objectives", "pieces"), [*((name, 1) for name in OBJECTIVES), ("pretraining", 2)])
@pytest.mark.slow
def test_gradients_of_two_threads_are_the_same_each_time(
    small_blip: Callable[..., Blip], small_blip2: Callable[..., Blip2], objectives: str, pieces: int
) -> None:
    """Under `deterministic` too, so that an operation that only happens to agree here is found."""
    family, settings = OBJECTIVES[objectives]
    size = {"image_size": 32}
    model: Any = (
        small_blip(**size, dropout=0.1) if family == "blip" else small_blip2(family.removeprefix("blip2"), **size)
    )
    learner = build_task(model, ObjectivesConfig(**settings, queue=0))
    gradients = Gradients(learner, ExecutionConfig(micro_batches=pieces), CPU, torch.float32)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 190, (ROWS, 12), generator=generator)
    mask = (torch.arange(12) < torch.randint(3, 13, (ROWS, 1), generator=generator)).long()
    images = torch.randn(ROWS, 3, 32, 32, generator=generator)
    batch = PairBatch(images, ids * mask, mask, torch.arange(ROWS) // 2)

    def step() -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        gradients.of(batch, 0.5)
        return {name: p.grad.clone() for name, p in learner.named_parameters() if p.grad is not None}

    before = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    first = step()
    assert any(g.any() for g in first.values())
    for checked in (True, False):
        learner.load_state_dict(before)
        with deterministic(checked, CPU):
            again = step()
        assert [name for name, g in first.items() if not torch.equal(g, again[name])] == []


def test_an_operation_without_a_deterministic_kernel_is_refused_by_name() -> None:
    message = r"resources\.deterministic: true cannot be had on cpu: put_ does not have"
    with pytest.raises(ModelError, match=message), deterministic(True, CPU):
        torch.zeros(4).put_(torch.tensor([0, 0]), torch.ones(2))
    assert not torch.are_deterministic_algorithms_enabled()


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), deterministic(True, CPU):
        torch.zeros(2, 3) @ torch.zeros(2, 3)


def test_unasked_nothing_changes() -> None:
    with deterministic(False, CPU):
        assert not torch.are_deterministic_algorithms_enabled()
        torch.zeros(4).put_(torch.tensor([0, 0]), torch.ones(2))
