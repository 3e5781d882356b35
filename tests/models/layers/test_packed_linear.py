from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capfilt.inference.device import autocast
from capfilt.models.layers.attention import FeedForward, FusedSelfAttention
from capfilt.models.layers.packed_linear import PackedLinear, PackedWeight, linear, pack

CPU = torch.device("cpu")
FORMATS = [torch.float32, torch.bfloat16]

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("format_", FORMATS)
@torch.inference_mode()
def test_it_gives_what_the_layer_gives(format_: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(300, 520), random(5, 7, 300)
    wanted, packed = F.linear(x.double(), layer.weight.double(), layer.bias.double()), PackedWeight(*layer.parameters())
    near = 1e-5 if format_ == torch.float32 else 2e-2
    with autocast(CPU, format_):
        for gelu in (False, True):
            actual = packed(x, gelu)
            assert actual.dtype == format_
            torch.testing.assert_close(actual.double(), F.gelu(wanted) if gelu else wanted, atol=near, rtol=near)
        torch.testing.assert_close(packed(x[0, 0]).double(), wanted[0, 0], atol=near, rtol=near)
        other = linear(PackedLinear(layer), x, torch.ones(520))
        torch.testing.assert_close(other.double(), wanted - layer.bias.double() + 1, atol=near, rtol=near)


@pytest.mark.parametrize("format_", FORMATS)
@torch.inference_mode()
def test_the_bits_of_a_row_are_the_same_among_any_rows(format_: torch.dtype, threads: int) -> None:
    if format_ == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU does not multiply bf16, and packs nothing in it")
    torch.manual_seed(0)
    for inputs, outputs in ((1536, 384), (384, 1536), (384, 5000)):
        packed, x = PackedWeight(torch.randn(outputs, inputs) / 20, torch.randn(outputs)), random(199, inputs)
        with autocast(CPU, format_):
            every = [packed(x, gelu) for gelu in (False, True)]
            for rows in (1, 2, 3, 4, 5, 12, 16, 37, 160):
                for gelu, wanted in enumerate(every):
                    assert torch.equal(packed(x[:rows], bool(gelu)), wanted[:rows]), rows
                    assert torch.equal(packed(x[-rows:], bool(gelu)), wanted[-rows:]), rows


@torch.inference_mode()
def test_two_threads_give_the_bits_of_one() -> None:
    before, x = torch.get_num_threads(), random(37, 1536)
    packed = PackedWeight(random(384, 1536), random(384))
    try:
        torch.set_num_threads(1)
        one = packed(x)
        torch.set_num_threads(2)
        assert torch.equal(packed(x), one)
    finally:
        torch.set_num_threads(before)


def test_gradients_are_those_of_the_layer() -> None:
    torch.manual_seed(0)
    plain, x = nn.Linear(256, 256), random(3, 256)
    packed = PackedLinear(plain)
    with torch.inference_mode():
        packed(x)
    (wanted,) = torch.autograd.grad(plain(x).square().sum(), plain.weight)
    (actual,) = torch.autograd.grad(packed(x).square().sum(), packed.weight)
    assert torch.equal(actual, wanted)


def test_other_formats_go_the_plain_way() -> None:
    packed = PackedWeight(random(256, 256), None)
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match="dtype"):
            packed(random(2, 256).double())
        exact = PackedWeight(random(256, 256).double(), None)
        assert exact(random(2, 256).double()).dtype == torch.float64
        assert packed(random(0, 256)).shape == (0, 256)


def test_large_layers_of_ours_are_packed_and_their_weights_stay_what_they_are() -> None:
    torch.manual_seed(0)
    block = FusedSelfAttention(256, 4, key_bias=False)
    block.theirs = nn.TransformerEncoderLayer(256, 2, 256)
    block.small = FeedForward(32, 64)
    x, before = random(2, 9, 256), {name: value.clone() for name, value in block.state_dict().items()}
    with torch.inference_mode():
        wanted = block(x)
    pack(block)
    packed = [name for name, module in block.named_modules() if isinstance(module, PackedLinear)]
    assert packed == ["qkv", "out"]
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    assert block.state_dict().keys() == before.keys()
    with torch.inference_mode():
        torch.testing.assert_close(block(x), wanted)


@torch.inference_mode()
def test_feed_forward_layers_fuse_their_gelu_and_no_other_activation() -> None:
    for activation in ("gelu", "quick_gelu"):
        torch.manual_seed(0)
        layers, x = FeedForward(128, 512, activation), random(6, 128)
        wanted = layers(x)
        pack(layers)
        torch.testing.assert_close(layers(x), wanted)
