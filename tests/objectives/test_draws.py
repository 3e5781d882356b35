from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from capfilt.objectives.draws import Draws, GivenDraws, one_of_each_row


def test_draws_are_those_of_torch_s_generator() -> None:
    weights = torch.rand(5, 7)
    torch.manual_seed(3)
    wanted = torch.multinomial(weights, 1)[:, 0], torch.rand(2)
    torch.manual_seed(3)
    draws = Draws()
    assert torch.equal(draws.columns("wrong_images", weights), wanted[0])
    assert torch.equal(draws.take("masked", lambda: torch.rand(2)), wanted[1])


def test_a_row_without_weights_is_refused_and_what_is_not_finite_is_left_to_the_loss() -> None:
    with pytest.raises(RuntimeError, match="a draw by weights of which a row has none above 0"):
        one_of_each_row(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    for wrong in (torch.nan, torch.inf):
        assert one_of_each_row(torch.tensor([[0.0, 1.0], [wrong, 0.0]])).tolist() == [1, 0]


def test_of_the_least_weights_one_is_drawn_and_none_that_is_0() -> None:
    """A sharp temperature leaves wrong partners no more: such a row is neither an error nor its own partner."""
    least = torch.tensor([[0.0, 1e-45]]).expand(1000, 2)
    assert bool((one_of_each_row(least) == 1).all())


def test_what_is_given_stands_in_the_place_of_a_draw() -> None:
    draws, weights = GivenDraws(wrong_images=torch.tensor([2, 0]), region_step=True), torch.rand(2, 3)
    state = torch.get_rng_state()
    for _ in range(2):  # at every step
        assert draws.columns("wrong_images", weights).tolist() == [2, 0]
        assert draws.take("region_step", lambda: False) is True
    assert torch.equal(torch.get_rng_state(), state)
    assert draws.weights.keys() == {"wrong_images"}
    assert torch.equal(draws.weights["wrong_images"], weights)


def test_a_draw_for_which_nothing_is_given_is_refused() -> None:
    with pytest.raises(LookupError, match="nothing is given for the draw wrong_texts; given are: wrong_images"):
        GivenDraws(wrong_images=torch.tensor([0])).columns("wrong_texts", torch.ones(1, 1))


@pytest.mark.parametrize("given", [[0], [0, 1, 2], [0, 3], [-1, 0]])
def test_columns_that_cannot_have_been_drawn_are_refused(given: list[int]) -> None:
    with pytest.raises(ValueError, match="the draw wrong_images takes 2 columns from 0 to 2"):
        GivenDraws(wrong_images=torch.tensor(given)).columns("wrong_images", torch.ones(2, 3))


def test_the_comparison_in_the_docs_runs(small_blip: Callable[..., Any], pytestconfig: pytest.Config) -> None:
    page = (pytestconfig.rootpath / "docs" / "parity.md").read_text()
    (code,) = re.findall(r"^### Comparing with other code.*?^```python\n(.*?)^```", page, re.M | re.S)
    ids = torch.randint(4, 190, (3, 6))
    names = {
        "model": small_blip(),
        "ids": ids,
        "mask": torch.ones_like(ids),
        "images": torch.randn(3, 3, 16, 16).double(),
    }
    exec(code, names)
    assert {name: loss.dtype for name, loss in names["losses"].items()} == dict.fromkeys(
        ("itc", "itm", "lm"), torch.double
    )
    assert names["weights"].shape == (3, 3)
    assert names["weights"].diagonal().tolist() == [0, 0, 0]
