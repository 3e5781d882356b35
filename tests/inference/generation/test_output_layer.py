from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from capfilt.inference.config import DecodeConfig
from capfilt.inference.device import autocast
from capfilt.inference.generation.decode import generate
from capfilt.inference.generation.output_layer import LARGE, blocked_head
from capfilt.models import Blip

MakeBlip = Callable[..., Blip]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest, small_blip: MakeBlip) -> Blip:
    return small_blip(vocab_size=LARGE + 7, roles=("decoder",), tie_lm_head=request.param)


@torch.inference_mode()
def test_it_gives_the_logits_of_the_model(model: Blip) -> None:
    head = blocked_head(model)
    assert head is not None
    states = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    wanted = model.text.logits(states[:, None])[:, 0]
    torch.testing.assert_close(head(states), wanted, atol=1e-5, rtol=1e-5)
    for i in range(9):
        torch.testing.assert_close(head(states[i : i + 1]), wanted[i : i + 1], atol=1e-5, rtol=1e-5)
    with autocast(torch.device("cpu"), torch.bfloat16):
        assert head(states).dtype == torch.bfloat16


def test_the_texts_are_those_of_the_model(model: Blip) -> None:
    images = torch.randn(6, 5, 24, generator=torch.Generator().manual_seed(4))
    keys = model.image_context(images, "decoder")
    draws = torch.from_numpy(np.random.default_rng(0).random((6, 9)))
    for method in ("greedy", "nucleus"):
        config = DecodeConfig(method=method, min_length=3, max_length=10)
        row = generate(model, keys, [model.config.text.dec], 3, config, draws)
        assert generate(model, keys, [model.config.text.dec], 3, config, draws, blocked_head(model)) == row


def test_a_small_vocabulary_needs_none(small_blip: MakeBlip) -> None:
    assert blocked_head(small_blip()) is None
