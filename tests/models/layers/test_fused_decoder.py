from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from capfilt.errors import ModelError
from capfilt.models.layers.bert import Cache, StackConfig, TextTransformer
from capfilt.models.layers.config import FusionTextConfig, TextConfig
from capfilt.models.layers.fused_decoder import FusedDecoder
from capfilt.models.layers.image_context import ImageContext

SHAPE = {"vocab_size": 90, "width": 32, "depth": 3, "heads": 4, "hidden": 64, "max_positions": 16, "dropout": 0.0}
IDS = torch.randint(4, 80, (6, 9), generator=torch.Generator().manual_seed(0))
STACKS = {
    "blip": TextConfig(**SHAPE, init_std=0.2, roles=("decoder",)),
    "blip, shared, a head of its own": TextConfig(**SHAPE, init_std=0.2, share="none", tie_lm_head=False),
    "albef": FusionTextConfig(**SHAPE, init_std=0.2, fusion_layer=1),
}


def stack(config: StackConfig) -> TextTransformer:
    """With biases and norms that a fault in moving them would show."""
    made, draw = TextTransformer(config, 24).eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if name.endswith("bias") or "norm" in name:
                weight += 0.3 * torch.randn(weight.shape, generator=draw)
    return made


@torch.no_grad()
def plain(made: TextTransformer, image: ImageContext, prompt: int) -> Tensor:
    """The logits after each token from the last of the prompt on, by the stack itself."""
    cache, logits = Cache(made.config, len(IDS), IDS.shape[1], image.tensors[0]), []
    for start, end in steps(prompt):
        states = made(IDS[:, start:end], "decoder", None, image, cache)
        logits.append(made.logits(states[:, -1:])[:, 0].double())
    return torch.stack(logits)


def fused(made: TextTransformer, image: ImageContext, prompt: int, dtype: torch.dtype) -> Tensor:
    decoder, logits = FusedDecoder(made, dtype), []
    image = ImageContext(tuple(tensor.to(dtype) for tensor in image.tensors))
    cache = torch.full(decoder.cache_shape(len(IDS), IDS.shape[1]), torch.nan, dtype=dtype)
    for start, end in steps(prompt):
        logits.append(decoder.step(IDS[:, start:end], start, image, cache).double())
    return torch.stack(logits)


def steps(prompt: int) -> list[tuple[int, int]]:
    return [(0, prompt), *((i, i + 1) for i in range(prompt, IDS.shape[1]))]


@pytest.mark.parametrize("prompt", [1, 4])
@pytest.mark.parametrize("config", STACKS.values(), ids=STACKS)
def test_its_logits_are_those_of_the_stack(config: StackConfig, prompt: int) -> None:
    """In float64, three texts for each of two images; whatever lies in an empty cache."""
    made = stack(config).double()
    image = made.image_context(torch.randn(2, 5, 24, dtype=torch.double), "decoder")
    wanted = plain(made, image, prompt)
    torch.testing.assert_close(fused(made, image, prompt, torch.double), wanted, atol=1e-12, rtol=0)
    assert (wanted - wanted.flip(1)).abs().max() > 0.1, "a wrong one would be seen"


def test_in_bf16_it_rounds_little_more_than_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The residual stream is bf16 as well, and GELU by tanh, as on a GPU: 0.8 to 1.5 times the error was seen, up to
    BLIP-base's size."""

    def of_cuda(*given: Tensor, use_gelu: bool) -> Tensor:
        return F.gelu(torch.addmm(*(x.float() for x in given)), approximate="tanh").bfloat16()

    monkeypatch.setattr(torch, "_addmm_activation", of_cuda)
    made = stack(STACKS["blip"])
    tokens = torch.randn(6, 5, 24, generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        image = made.image_context(tokens, "decoder")
        rounded = plain(made, image, 1)
        found = fused(made, image, 1, torch.bfloat16)
    made.double()
    exact = plain(made, made.image_context(tokens.double(), "decoder"), 1)
    assert (found - exact).square().mean() <= 2 * 2 * (rounded - exact).square().mean()
    assert (found - exact).abs().max() < 0.1 * exact.std()


def test_a_text_longer_than_the_positions_is_refused() -> None:
    made = stack(STACKS["blip"])
    decoder, image = FusedDecoder(made, torch.float32), made.image_context(torch.randn(6, 5, 24), "decoder")
    with pytest.raises(ModelError, match="a text of 17 tokens, and the model has 16 positions"):
        decoder.step(IDS[:, :1], 16, image, torch.zeros(decoder.cache_shape(6, 17)))
