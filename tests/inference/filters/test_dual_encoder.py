"""A filter that compares and does not fuse, against the cosines of the same model's fusion filter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from capfilt.data.images.preprocess import CLIP_PREPROCESS
from capfilt.data.text.byte_bpe import ByteBpeTokenizer
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.inference.filters import DualEncoderFilter, FusionFilter, local_filter
from capfilt.inference.local_model import LocalModel
from capfilt.models import Blip

TEXTS = [["a red circle", "photo"], [], ["A red circle!"] * 3, ["a tan ring"]]


@pytest.fixture(scope="module")
def local(small_blip: Callable[..., Blip]) -> LocalModel:
    return LocalModel(small_blip(roles=("encoder",)), Tokenizer.load("world"))


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randn(4, 5, 24, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("most", [1, 3, 2048])
def test_its_cosines_are_those_of_a_filter_that_fuses_and_itm_is_not_given(
    local: LocalModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr("capfilt.inference.filters.dual_encoder.MAX_TEXTS", most)
    scores, wanted = (kind(local, 16).score_tokens(tokens, TEXTS) for kind in (DualEncoderFilter, FusionFilter))
    assert scores["itm"] is None
    assert wanted["itm"] is not None
    assert [len(of_image) for of_image in wanted["itm"]] == [2, 0, 3, 1]
    for of_image, other in zip(scores["itc"] or [], wanted["itc"] or [], strict=True):
        np.testing.assert_allclose(of_image, other, atol=1e-6)


def test_images_without_any_text_have_no_scores(local: LocalModel, tokens: Tensor) -> None:
    assert DualEncoderFilter(local).score_tokens(tokens[:2], [[], []]) == {"itm": None, "itc": [[], []]}
    assert FusionFilter(local).score_tokens(tokens[:2], [[], []]) == {"itm": [[], []], "itc": [[], []]}


def test_a_model_is_the_filter_that_it_can_be(local: LocalModel) -> None:
    assert isinstance(local_filter(local, 20), FusionFilter)
    assert local_filter(local, 20).max_length == 20


def test_a_clip_s_texts_are_read_to_its_last_position(small_clip: Any) -> None:
    """Where nobody says otherwise; with 35 tokens, as BLIP evaluates, an end that tells them apart would be cut."""
    local = LocalModel(small_clip(max_positions=50), ByteBpeTokenizer.load("world"), CLIP_PREPROCESS)
    texts = ["red " * 40 + end for end in ("circle", "square")]
    ways = [local_filter(local), local_filter(local, 35)]
    assert [bool(np.abs(np.diff(way.text_features(texts), axis=0)).max() > 1e-4) for way in ways] == [True, False]
    assert [way.reads_all(texts[0]) for way in ways] == [True, False]
