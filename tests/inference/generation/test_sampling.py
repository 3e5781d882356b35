from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from capfilt.inference.generation import sampling
from capfilt.inference.generation.sampling import nucleus, penalise

WORDS = sampling.LARGE + 900


def by_sorting(logits: Tensor, draw: Tensor, top_p: float, top_k: int) -> Tensor:
    reach = torch.full((len(draw), 1), top_p, dtype=torch.double)
    return sampling._sorted(logits.softmax(dim=1), draw, reach, top_k)


@given(
    seed=st.integers(0, 2**32),
    spread=st.sampled_from([0.0, 0.01, 0.4, 2.0, 8.0, 40.0]),
    levels=st.sampled_from([0, 3, 200]),
    top_p=st.sampled_from([0.001, 0.1, 0.5, 0.9, 0.999999, 1.0]),
    top_k=st.sampled_from([0, 1, 50, 3000]),
)
@example(seed=0, spread=40.0, levels=3, top_p=1.0, top_k=0)  # most probabilities are 0, and all are the nucleus
def test_counting_finds_what_sorting_finds(seed: int, spread: float, levels: int, top_p: float, top_k: int) -> None:
    """Flat and peaked distributions, with ties (which bf16 makes) and without, and every kind of draw."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, WORDS, generator=random) * spread
    if levels:
        logits = (logits * levels).round() / levels
    logits[:, 3] = -torch.inf
    draw = torch.tensor([0.0, 1 - 2**-53, 0.5, *torch.rand(3, generator=random, dtype=torch.double).tolist()])
    draw = draw.double()
    assert torch.equal(nucleus(logits, draw, top_p, top_k), by_sorting(logits, draw, top_p, top_k))


@pytest.mark.parametrize("top_k", [0, 40])
def test_a_row_is_drawn_alike_whatever_is_beside_it(top_k: int) -> None:
    logits = torch.randn(9, WORDS, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 9, 9)[:, None]
    draw = torch.linspace(0.05, 0.95, 9, dtype=torch.double)
    together = nucleus(logits, draw, 0.9, top_k)
    for i in range(9):
        assert nucleus(logits[i : i + 1], draw[i : i + 1], 0.9, top_k) == together[i]


def test_one_word_that_is_all_there_is() -> None:
    logits = torch.full((1, WORDS), -torch.inf)
    logits[0, 77] = 1.0
    for draw in (0.0, 0.5, 1 - 2**-53):
        assert nucleus(logits, torch.tensor([draw], dtype=torch.double), 0.9).tolist() == [77]


def test_a_large_vocabulary_is_drawn_from_by_its_probabilities() -> None:
    odds = np.zeros(WORDS)
    odds[[5, 900, 4000]] = 0.5, 0.3, 0.2
    logits = torch.from_numpy(np.log(odds + 1e-30)).float().expand(4000, -1)
    draws = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    drawn = nucleus(logits, draws, top_p=0.75).bincount(minlength=WORDS)
    assert drawn[[5, 900, 4000]].tolist() == pytest.approx([4000 * 0.5 / 0.8, 4000 * 0.3 / 0.8, 0], abs=120)
    assert drawn.sum() == drawn[[5, 900]].sum()


def test_the_penalty_divides_what_is_likely_and_multiplies_what_is_not() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.5], [2.0, -2.0, 1.0, 0.5]])
    actual = penalise(logits, torch.tensor([[0, 1, 1], [2, 2, 2]]), 2.0)
    assert actual.tolist() == [[1.0, -4.0, 1.0, 0.5], [2.0, -2.0, 0.5, 0.5]]
