"""MLM against a loop over tokens, with and without the momentum copy's guesses."""

from __future__ import annotations

import pytest
import torch

from capfilt.objectives.losses.mlm import mlm, num_hidden
from capfilt.objectives.masking import IGNORED


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_against_a_loop_over_tokens(alpha: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True)
    momentum = torch.randn(3, 5, 7, dtype=torch.float64)
    labels = torch.full((3, 5), IGNORED)
    labels[0, 1], labels[0, 4], labels[2, 0] = 3, 6, 0
    terms = []
    for b, t in ((0, 1), (0, 4), (2, 0)):
        log_p = logits[b, t].log_softmax(dim=0)
        soft = momentum[b, t].softmax(dim=0)
        terms.append(-(1 - alpha) * log_p[labels[b, t]] - alpha * (soft * log_p).sum())
    slow = torch.stack(terms).mean()
    fast = mlm(logits, labels, momentum, alpha)
    assert fast.dtype == torch.float64
    assert torch.allclose(fast, slow, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(loss, logits) for loss in (fast, slow)), strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    assert int(num_hidden(labels)) == 3


def test_without_a_momentum_copy_it_is_cross_entropy() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[IGNORED, 2, 4], [IGNORED, IGNORED, 1]])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    assert torch.allclose(mlm(logits, labels), expected)


def test_nothing_hidden_costs_nothing() -> None:
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = mlm(logits, torch.full((2, 3), IGNORED), torch.randn(2, 3, 5), 0.4)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()
