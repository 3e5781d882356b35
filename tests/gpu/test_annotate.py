"""Captions and scores of a GPU beside those of a CPU, in fp32: the same texts, and the same scores up to rounding."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from capfilt.data.images.preprocess import ImageFormat
from capfilt.data.sample import Sample
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.inference.annotator import Annotator, Text
from capfilt.inference.batches import Images
from capfilt.inference.captioners.local import LocalCaptioner
from capfilt.inference.config import DecodeConfig
from capfilt.inference.device import autocast
from capfilt.inference.filters.fusion import FusionFilter
from capfilt.inference.local_model import LocalModel
from capfilt.models import Blip

MakeBlip = Callable[..., Blip]
SAMPLES = [Sample(f"{i}", b"", "png", "", {"uid": f"{i:032x}"}) for i in range(11)]
FORMAT = ImageFormat(16)
WEB = [["a red circle"], ["a red circle", "photo " * 40], [], [""], ["Photo!"], *(["a tan ring"] for _ in range(6))]
METHODS = {
    "nucleus": DecodeConfig(min_length=3, max_length=24),
    "nucleus, penalty, top k": DecodeConfig(min_length=3, max_length=24, repetition_penalty=1.3, top_k=5),
    "greedy, penalty": DecodeConfig(method="greedy", min_length=3, max_length=24, repetition_penalty=1.1),
    "beam": DecodeConfig(method="beam", min_length=3, max_length=24),
    "beam, penalty": DecodeConfig(method="beam", min_length=3, max_length=24, repetition_penalty=1.1),
}


def roles(small_blip: MakeBlip, shared: bool) -> tuple[Blip, Blip]:
    """A captioner that writes texts of many lengths, and a filter: one model, or two."""
    if shared:
        captioner = filter_ = small_blip(seed=3)
    else:
        captioner, filter_ = small_blip(seed=1, roles=("decoder",)), small_blip(seed=2, roles=("encoder",))
    with torch.no_grad():
        captioner.text.head.bias[3] += 3
    return captioner, filter_


def annotate(captioner: Blip, filter_: Blip, pixels: Tensor, config: DecodeConfig) -> list[list[Text]]:
    tokenizer, captions = Tokenizer.load("world"), 1 if config.method == "greedy" else 3
    made = Annotator(
        LocalCaptioner(LocalModel(captioner, tokenizer), config, captions, seed=5, round_=1),
        FusionFilter(LocalModel(filter_, tokenizer), 16),
    )
    return made.annotate(Images({FORMAT: pixels}), SAMPLES, WEB)


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(11, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2


@pytest.mark.parametrize("shared", [False, True], ids=["two towers", "one tower"])
@pytest.mark.parametrize("method", METHODS)
def test_texts_and_scores_are_those_of_a_cpu(
    small_blip: MakeBlip, pixels: Tensor, cuda: torch.device, method: str, shared: bool
) -> None:
    captioner, filter_ = roles(small_blip, shared)
    wanted = annotate(captioner, filter_, pixels, METHODS[method])
    captioner, filter_ = copy.deepcopy((captioner, filter_))
    found = annotate(captioner.to(cuda), filter_.to(cuda), pixels.to(cuda), METHODS[method])
    for own, other in zip(found, wanted, strict=True):
        assert [(t.source, t.text, t.whole) for t in own] == [(t.source, t.text, t.whole) for t in other]
        for score in ("itm", "itc"):
            values = [getattr(text, score) for text in other]
            assert [getattr(text, score) for text in own] == pytest.approx(values, abs=1e-5)


@pytest.mark.parametrize("method", ["nucleus", "beam"])
def test_every_picture_is_annotated_in_bf16(
    small_blip: MakeBlip, pixels: Tensor, cuda: torch.device, method: str
) -> None:
    captioner, filter_ = roles(small_blip, shared=False)
    with autocast(cuda, torch.bfloat16):
        found = annotate(captioner.to(cuda), filter_.to(cuda), pixels.to(cuda), METHODS[method])
    assert [len(of_image) - len(web) for of_image, web in zip(found, WEB, strict=True)] == [3] * 11
    assert all(text.itm is None or 0 <= text.itm <= 1 for of_image in found for text in of_image)
