from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from capfilt.data.images.preprocess import ImageFormat
from capfilt.data.sample import Sample
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.evaluation import speed
from capfilt.evaluation.speed import Load
from capfilt.inference.annotator import Annotator
from capfilt.inference.batches import Images
from capfilt.inference.captioners.local import LocalCaptioner
from capfilt.inference.config import DecodeConfig
from capfilt.inference.filters.fusion import FusionFilter
from capfilt.inference.local_model import LocalModel
from capfilt.models import Blip

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def annotator(small_blip: Callable[..., Blip]) -> Annotator:
    local = LocalModel(small_blip(), Tokenizer.load("world"))
    config = DecodeConfig(min_length=9, max_length=10)
    return Annotator(LocalCaptioner(local, config, 2), FusionFilter(local, 16))


@pytest.fixture(scope="module")
def load() -> Load:
    pixels = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    samples = [Sample(f"{i}", b"", "png", "", {"uid": f"{i:032x}"}) for i in range(6)]
    return Load(Images({ImageFormat(16): pixels}), samples, [["a red circle"]] * 6)


def test_a_load_goes_through_the_engine_in_batches(annotator: Annotator, load: Load) -> None:
    actual = load.annotated(annotator, 4)
    assert [text.text for row in actual for text in row] == [
        text.text for row in load.annotated(annotator, 6) for text in row
    ]
    assert [len(row) for row in actual] == [3] * 6


def test_fp32_agrees_with_itself_and_bf16_nearly(annotator: Annotator, load: Load) -> None:
    alone = speed.agreement(annotator, load, CPU, torch.float32, 1)
    assert alone["equal_tokens"] == 1
    assert max(alone["itm_error"], alone["itc_error"]) < 1e-5
    coarse = speed.agreement(annotator, load, CPU, torch.bfloat16, 6)
    assert 1e-6 < coarse["itc_error"] < 0.1
    assert 0.1 < coarse["equal_tokens"] <= 1


def test_the_machine_says_what_it_is() -> None:
    assert speed.machine(CPU)["device"] == "cpu"
    assert speed.machine(CPU)["threads"] == torch.get_num_threads()
    assert speed.versions()["torch"] == torch.__version__
