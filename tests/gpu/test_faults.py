"""Mistakes that only a GPU shows, planted: the tests of this folder must fail for them, on either kind of GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpus import Waits

from capfilt.data.text.tokenizer import Tokenizer
from capfilt.errors import ModelError
from capfilt.inference.batches import Images
from capfilt.inference.captioners import local as captioners
from capfilt.inference.captioners.vlm.captioner import _NextTokens
from capfilt.inference.config import DecodeConfig
from capfilt.inference.filters.fusion import FusionFilter
from capfilt.inference.generation.decode import generate
from capfilt.inference.local_model import LocalModel
from capfilt.models.layers.attention import Packing


@pytest.fixture
def role(small_blip: Callable[..., Any], cuda: torch.device) -> tuple[LocalModel, Images]:
    """A model of both roles, and five pictures."""
    local = LocalModel(small_blip().to(cuda), Tokenizer.load("world"))
    return local, Images({local.image_format: torch.randn(5, 3, 16, 16).to(cuda)})


def score(role: tuple[LocalModel, Images]) -> object:
    return FusionFilter(role[0], 16).score(role[1], [["a red circle"]] * 5)


def write(role: tuple[LocalModel, Images]) -> object:
    captioner = captioners.LocalCaptioner(role[0], DecodeConfig(min_length=3, max_length=20))
    return captioner.write(role[0].image_tokens(role[1]), [f"{i:032x}" for i in range(5)])


def test_what_is_whole_passes(role: tuple[LocalModel, Images]) -> None:
    score(role)
    write(role)


def test_a_place_that_stays_on_the_cpu(role: tuple[LocalModel, Images], monkeypatch: pytest.MonkeyPatch) -> None:
    made = Packing.__init__

    def faulty(self: Packing, *given: Any) -> None:
        made(self, *given)
        self._index = self._index.cpu()

    monkeypatch.setattr(Packing, "__init__", faulty)
    with pytest.raises(RuntimeError, match=r"cpu|CPU"):
        score(role)


def test_draws_that_stay_on_the_cpu(role: tuple[LocalModel, Images], monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(*given: Any) -> Any:
        return generate(*(x.cpu() if isinstance(x, torch.Tensor) else x for x in given))

    monkeypatch.setattr(captioners, "generate", faulty)
    with pytest.raises(RuntimeError, match=r"cpu|CPU"):
        write(role)


def test_a_tensor_that_numpy_is_given(role: tuple[LocalModel, Images]) -> None:
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        role[0].image_tokens(role[1]).detach().numpy()


@pytest.mark.parametrize("method", ["nucleus", "greedy", "beam"])
@pytest.mark.parametrize("where", ["a position", "the head"])
def test_logits_that_are_no_numbers(role: tuple[LocalModel, Images], method: str, where: str) -> None:
    """From NaN no index out of range is made, which would end the process; what is read long before the next look is
    noticed there."""
    local, images = role
    config = DecodeConfig.model_validate({"method": method, "min_length": 18, "max_length": 20})
    text: Any = local.model.decoder_stack
    with torch.no_grad():
        text.embeddings.of("decoder").positions.weight[3] *= torch.nan if where == "a position" else 1
        text.head.bias[40] *= torch.nan if where == "the head" else 1
    captioner = captioners.LocalCaptioner(local, config)
    with pytest.raises(ModelError, match="logits are NaN"):
        captioner.write(local.image_tokens(images), [f"{i:032x}" for i in range(5)])


def test_logits_that_are_numbers_again(cuda: torch.device) -> None:
    """What overflows behind the cache alone, in a chat model in fp16, is not there in the next step."""
    chooser = _NextTokens(DecodeConfig(), torch.rand(2, 2, dtype=torch.double).to(cuda))
    for value in (torch.nan, 0.0):
        chooser(torch.zeros(2, 1, dtype=torch.long).to(cuda), torch.full((2, 9), value).to(cuda))
    with pytest.raises(ModelError, match="logits are NaN"):
        chooser.finite.check()


@pytest.mark.parametrize(
    "fault",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.isfinite().all()),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: x.nonzero(),
        lambda x: x.repeat_interleave(torch.ones(4, dtype=torch.long, device=x.device), dim=0),
    ],
)
def test_a_wait(fault: Callable[[torch.Tensor], Any], cuda: torch.device, waits: Waits) -> None:
    x = torch.randn(4, 4).to(cuda)
    with waits() as found:
        (x @ x).relu().sum()
    assert found == []
    with waits() as found:
        fault(x)
    assert len(found) == 1
