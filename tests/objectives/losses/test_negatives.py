from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from capfilt.objectives.draws import Draws
from capfilt.objectives.losses.negatives import negative_weights, negative_weights_among_others


def drawn_by(weights: Callable[..., Tensor], *of: Tensor) -> Tensor:
    """A column of each row."""
    return Draws().columns("", weights(*of))


def chance(observed: list[int], expected: list[float]) -> float:
    """The p-value of Pearson's chi-square test."""
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    freedom = torch.tensor((len(observed) - 1) / 2, dtype=torch.double)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.double)))


class TestNegativeWeights:
    @pytest.mark.parametrize("sure", [False, True])
    def test_are_drawn_by_softmax_of_similarity_plus_a_ten_thousandth(self, sure: bool) -> None:
        torch.manual_seed(0)
        B, draws = 6, 1500
        # A row that is sure of its own pair leaves the others 4.5e-5, 1.7e-5 and less, where 1e-4 more is much.
        graded = (-10.0 - torch.arange(B)).repeat(B, 1).fill_diagonal_(0)
        similarity = graded if sure else torch.randn(B, B) * 2
        counts = torch.zeros(B, B, dtype=torch.long)
        for _ in range(draws):
            counts[torch.arange(B), drawn_by(negative_weights, similarity, torch.arange(B), torch.arange(B))] += 1
        assert counts.diagonal().tolist() == [0] * B
        for row in range(B):
            others = [c for c in range(B) if c != row]
            total = sum(math.exp(x) for x in similarity[row].tolist())
            weights = [math.exp(float(similarity[row, c])) / total + 1e-4 for c in others]
            expected = [draws * w / sum(weights) for w in weights]
            assert chance(counts[row, others].tolist(), expected) > 1e-3

    def test_what_underflows_is_drawn_evenly(self) -> None:
        """A row so sure of itself that nothing else has a probability: without 1e-4 there is nothing to draw."""
        torch.manual_seed(0)
        B = 5
        counts = torch.zeros(B, B, dtype=torch.long)
        for _ in range(1000):
            counts[
                torch.arange(B), drawn_by(negative_weights, torch.eye(B) * 1000, torch.arange(B), torch.arange(B))
            ] += 1
        for row in range(B):
            others = [c for c in range(B) if c != row]
            assert chance(counts[row, others].tolist(), [1000 / 4] * 4) > 1e-3

    def test_one_image_is_never_a_negative_of_itself(self) -> None:
        torch.manual_seed(0)
        image_ids = torch.tensor([0, 1, 0, 2, 1, 0, 3])
        similarity = torch.where(image_ids[:, None] == image_ids[None, :], 50.0, 0.0)  # the temptation is great
        drawn = torch.stack([drawn_by(negative_weights, similarity, image_ids, image_ids) for _ in range(300)])
        assert not (image_ids[drawn] == image_ids).any()
        assert {int(c) for c in drawn[:, 0]} == {1, 3, 4, 6}

    def test_two_rows_are_each_other_s(self) -> None:
        assert drawn_by(negative_weights, torch.zeros(2, 2), torch.arange(2), torch.arange(2)).tolist() == [1, 0]

    @pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
    def test_similarities_that_are_not_finite_are_no_crash(self, wrong: float) -> None:
        similarity = torch.randn(3, 3)
        similarity[1] = wrong
        drawn = drawn_by(negative_weights, similarity, torch.arange(3), torch.arange(3))
        assert not (drawn == torch.arange(3)).any()

    @pytest.mark.parametrize("B", [1, 4])
    def test_a_batch_of_one_image_is_no_crash(self, B: int) -> None:
        one = torch.zeros(B, dtype=torch.long)
        drawn = drawn_by(negative_weights, torch.randn(B, B), one, one)
        assert drawn.shape == (B,)
        assert ((drawn >= 0) & (drawn < B)).all()

    @pytest.mark.parametrize("epsilon", [1e-4, 1e-5, 0.0])
    def test_are_those_of_the_public_codes(self, epsilon: float) -> None:
        """Written as BLIP writes them: the softmax of a row, plus epsilon, and the diagonal set to 0."""
        torch.manual_seed(0)
        similarity = torch.randn(4, 4, dtype=torch.double)
        wanted = torch.stack([row.exp() / row.exp().sum() + epsilon for row in similarity]).fill_diagonal_(0)
        found = negative_weights(similarity, torch.arange(4), torch.arange(4), epsilon)
        torch.testing.assert_close(found, wanted)

    def test_without_epsilon_what_underflows_is_drawn_evenly_too(self) -> None:
        """The released retrieval code stops here: multinomial refuses a row of zeros."""
        image_ids = torch.tensor([0, 1, 2, 0])
        similarity = torch.where(torch.eye(4) == 1, 1000.0, 0.0)
        weights = negative_weights(similarity, image_ids, image_ids, 0.0)
        assert weights.tolist() == [[0, 1, 1, 0], [1, 0, 1, 1], [1, 1, 0, 1], [0, 1, 1, 0]]


class TestWeightsAmongOthers:
    def test_are_drawn_by_softmax_over_other_images(self) -> None:
        torch.manual_seed(0)
        image_ids, draws = torch.tensor([0, 1, 2, 0, 3, 4]), 3000
        similarity = torch.randn(6, 6) * 2
        similarity.fill_diagonal_(500.0)  # so sure of the own pair that all else underflows beside it
        counts = torch.zeros(6, 6)
        for _ in range(draws):
            counts[torch.arange(6), drawn_by(negative_weights_among_others, similarity, image_ids, image_ids)] += 1
        for row in range(6):
            others = [c for c in range(6) if image_ids[c] != image_ids[row]]
            assert counts[row].sum() == counts[row, others].sum()
            odds = [math.exp(float(similarity[row, c])) for c in others]
            expected = torch.tensor([draws * o / sum(odds) for o in odds])
            far = ((counts[row, others] - expected).square() / expected).sum()
            freedom = torch.tensor((len(others) - 1) / 2)
            assert torch.special.gammaincc(freedom, far / 2) > 1e-3

    @pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
    def test_neither_one_image_nor_what_is_not_finite_is_a_crash(self, wrong: float) -> None:
        similarity = torch.full((3, 3), wrong)
        for image_ids in (torch.zeros(3, dtype=torch.long), torch.arange(3)):
            drawn = drawn_by(negative_weights_among_others, similarity, image_ids, image_ids)
            assert ((drawn >= 0) & (drawn < 3)).all()
