"""Grad-CAM beside the formula written out: softmax attention head by head, autograd through it, loops over words."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from capfilt.data.text.language_tokenizer import tokenizer_of
from capfilt.errors import UsageError
from capfilt.inference.filters.fusion import FusionFilter
from capfilt.inference.heatmap import check_heatmap, heatmaps
from capfilt.inference.local_model import LocalModel
from capfilt.models import architecture_of, build

TEXTS = ["a red circle", "Two blue crosses on a gray background, and a ring!", "ring", ""]


@pytest.fixture(scope="module", params=["blip", "albef/tiny", "xvlm/tiny"])
def local(request: pytest.FixtureRequest, small_blip: Callable[..., Any]) -> LocalModel:
    torch.manual_seed(3)
    model = small_blip(depth=4) if request.param == "blip" else build(architecture_of(request.param))
    return LocalModel(model.eval(), tokenizer_of("world", model.config.tokenizer_kind))


@pytest.fixture(scope="module")
def pixels(local: LocalModel) -> Tensor:
    side = local.model.config.image_size
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))


def attend(block: Any, x_TD: Tensor, source_SD: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Attention as the papers write it; the weights of each head [T, S] keep their gradients."""
    query, key, value = block.query(x_TD), block.key(source_SD), block.value(source_SD)
    d = query.shape[1] // block.heads
    weights, outputs = [], []
    for head in range(block.heads):
        part = slice(head * d, (head + 1) * d)
        weights.append(torch.softmax(query[:, part] @ key[:, part].T / math.sqrt(d), dim=1))
        weights[-1].retain_grad()
        outputs.append(weights[-1] @ value[:, part])
    return block.out(torch.cat(outputs, dim=1)), weights


def by_hand(local: LocalModel, pixels: Tensor, text: str, layer: int) -> np.ndarray:
    """The heatmap of one text alone."""
    model, tokenizer = local.model, local.tokenizer
    ids = torch.from_numpy(tokenizer.encode([tokenizer.clean(text)], 35)[0])
    tokens_ND = model.encode_image(pixels)[0].detach()
    x = model.text.embeddings.of("encoder")(model.fused_ids(ids))[0]  # type: ignore[operator]
    kept: list[Tensor] = []
    for number, each in enumerate(model.text.layers):
        mine = each.self_attention.of("encoder")
        x = mine.norm(x + attend(mine.block, x, x)[0])
        if number >= model.config.text.fusion_layer:
            cross = each.cross_attention.of("encoder")
            y, weights = attend(cross.block, x, tokens_ND)
            x = cross.norm(x + y)
            kept = weights if number == layer else kept
        x = each.feed_forward.of("encoder")(x)
    model.match(x[None])[0, 1].backward()
    places = [t for t, id_ in enumerate(ids[0].tolist()) if id_ not in (tokenizer.cls, tokenizer.sep)]
    if not places or layer == len(model.text.layers) - 1:
        places = [0]
    cam = np.zeros(len(tokens_ND) - 1)
    for weights_TS in kept:
        for t in places:
            for n in range(1, len(tokens_ND)):
                assert weights_TS.grad is not None
                cam[n - 1] += weights_TS[t, n].item() * max(0.0, weights_TS.grad[t, n].item())
    side = math.isqrt(len(cam))
    return (cam / (cam.max() or 1.0)).reshape(side, side)


@pytest.mark.parametrize("from_top", [0, 1, 2])
def test_it_is_the_formula_for_texts_of_any_length_in_one_batch(
    local: LocalModel, pixels: Tensor, from_top: int
) -> None:
    """From the top: the last layer, where the first token alone decides, and those below it."""
    layers = local.model.config.fusion_layers
    if from_top >= len(layers):
        pytest.skip(f"it fuses in {len(layers)} layers")
    layer = layers[-1 - from_top]
    ours = heatmaps(local, pixels, TEXTS, layer=layer)
    theirs = np.stack([by_hand(local, pixels, text, layer) for text in TEXTS])
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, atol=2e-4)
    assert (ours.max(axis=(1, 2)) == 1).all(), "every text has a map"
    assert len({each.tobytes() for each in ours}) == len(TEXTS)


def test_the_usual_way_stays_the_same_to_the_bit(local: LocalModel, pixels: Tensor) -> None:
    tokens = local.model.encode_image(pixels)
    before = FusionFilter(local).score_tokens(tokens, [TEXTS])
    heatmaps(local, pixels, TEXTS)
    assert FusionFilter(local).score_tokens(tokens, [TEXTS]) == before
    assert not any(module._forward_hooks for module in local.model.modules())


def test_a_frozen_model_and_inference_without_gradients_do_no_harm(local: LocalModel, pixels: Tensor) -> None:
    before = heatmaps(local, pixels, TEXTS)
    states = [parameter.requires_grad for parameter in local.model.parameters()]
    try:
        for parameter in local.model.parameters():
            parameter.requires_grad_(False)
        with torch.no_grad():
            np.testing.assert_array_equal(heatmaps(local, pixels, TEXTS), before)
    finally:
        for parameter, state in zip(local.model.parameters(), states, strict=True):
            parameter.requires_grad_(state)


@pytest.mark.parametrize(
    ("name", "layer"),
    [("blip/base", 6), ("albef/base", 8), ("xvlm/base-swin-384", 9), ("albef/tiny", 2), ("xvlm/tiny", 2)],
)
def test_the_layer_is_the_published_one(name: str, layer: int) -> None:
    assert check_heatmap(name, architecture_of(name)) == layer


@pytest.mark.parametrize("name", ["clip/tiny", "vilt/tiny", "vlmo/tiny", "blip2/tiny", "blip/base-captioner"])
def test_a_model_without_one_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} has no heatmap: it is of the family"):
        check_heatmap(name, architecture_of(name))


def test_a_layer_that_reads_the_text_alone_is_refused() -> None:
    with pytest.raises(UsageError, match="layer 5 of it does not attend to images; allowed are 6 to 11"):
        check_heatmap("it", architecture_of("albef/base"), 5)
