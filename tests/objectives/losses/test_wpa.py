"""Word-patch alignment against the best plan that linear programming finds, and against a loop over pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from capfilt.objectives.losses.wpa import BETA, STEPS, transport_cost, transport_plan, wpa


@pytest.fixture
def pair() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two texts beside two images, of unequal lengths."""
    torch.manual_seed(0)
    words = torch.tensor([[False, True, True, True, False], [False, True, False, False, False]])
    patches = torch.tensor([[False, True, True, True, True, True], [False, True, True, False, True, False]])
    return torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 6, 8, dtype=torch.float64), words, patches


def slow_cost(text: Tensor, image: Tensor) -> Tensor:
    """IPOT of one pair without padding, as arXiv 1802.04307 writes it (algorithm 1)."""
    costs = 1 - torch.nn.functional.cosine_similarity(text[:, None], image[None], dim=-1)
    M, N = costs.shape
    kernel, plan, rows = torch.exp(-costs / BETA), torch.ones(M, N, dtype=costs.dtype), torch.full((M,), 1 / M).double()
    for _ in range(STEPS):
        step = kernel * plan
        columns = (1 / N) / (step.T @ rows)
        rows = (1 / M) / (step @ columns)
        plan = torch.diag(rows) @ step @ torch.diag(columns)
    return (plan * costs).sum()


def test_padding_changes_nothing(pair: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    text, image, words, patches = pair
    slow = [slow_cost(text[b][words[b]], image[b][patches[b]]) for b in range(2)]
    assert torch.allclose(transport_cost(*pair), torch.stack(slow), atol=1e-10)


def test_the_plan_is_near_the_best_one() -> None:
    scipy = pytest.importorskip("scipy.optimize")
    torch.manual_seed(0)
    costs = torch.rand(1, 4, 6, dtype=torch.float64)
    plan = transport_plan(costs, torch.ones(1, 4, dtype=torch.bool), torch.ones(1, 6, dtype=torch.bool))[0]
    assert torch.allclose(plan.sum(1), torch.full((4,), 1 / 4).double(), atol=1e-4)
    assert torch.allclose(plan.sum(0), torch.full((6,), 1 / 6).double(), atol=1e-4)
    rows = np.kron(np.eye(4), np.ones(6))
    columns = np.kron(np.ones(4), np.eye(6))
    sums = np.concatenate([np.full(4, 1 / 4), np.full(6, 1 / 6)])
    best = scipy.linprog(costs.flatten().numpy(), A_eq=np.concatenate([rows, columns]), b_eq=sums)
    assert (plan * costs[0]).sum().item() == pytest.approx(best.fun, abs=3e-4)


def test_gradients_flow_through_costs_alone(pair: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    text, image, words, patches = pair
    text.requires_grad_()
    (gradient,) = torch.autograd.grad(transport_cost(text, image, words, patches).sum(), text)
    plan = transport_plan(
        (1 - torch.nn.functional.cosine_similarity(text.detach()[:, :, None], image[:, None], dim=-1)), words, patches
    )
    again = text.detach().clone().requires_grad_()
    costs = 1 - torch.nn.functional.cosine_similarity(again[:, :, None], image[:, None], dim=-1)
    (expected,) = torch.autograd.grad((costs * plan).sum(), again)
    assert torch.allclose(gradient, expected, atol=1e-10)


def test_a_text_without_words_costs_nothing(pair: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    text, image, words, patches = pair
    words[1] = False
    text.requires_grad_()
    costs = transport_cost(text, image, words, patches)
    assert costs[1].item() == 0
    (gradient,) = torch.autograd.grad(costs.sum(), text)
    assert bool(gradient.isfinite().all())


def test_wrong_pairs_are_drawn_apart() -> None:
    costs = torch.tensor([0.5, 0.25, 1.0])
    assert wpa(costs, torch.tensor([True, False, True])).item() == pytest.approx((0.5 - 0.25 + 1.0) / 3)
