from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from capfilt.inference.device import autocast
from capfilt.models.layers.attention import (
    Attention,
    FeedForward,
    FusedSelfAttention,
    Packing,
    attend,
    merge_heads,
    split_heads,
    stochastic_depth,
)
from capfilt.models.layers.packed_linear import multiplies_bf16, pack


def slow_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, seen: list[list[bool]] | None = None) -> Tensor:
    """One row, head by head and position by position: q [T, D], k and v [S, D] -> [T, D]."""
    q, k, v = q.detach(), k.detach(), v.detach()
    d = q.shape[1] // heads
    out = torch.zeros_like(q)
    for h in range(heads):
        part = slice(h * d, h * d + d)
        for t in range(q.shape[0]):
            weights = [
                math.exp(float(q[t, part] @ k[s, part]) / math.sqrt(d)) if seen is None or seen[t][s] else 0.0
                for s in range(k.shape[0])
            ]
            out[t, part] = sum(w * v[s, part] for s, w in enumerate(weights)) / sum(weights)
    return out


@pytest.fixture
def attention() -> Attention:
    torch.manual_seed(0)
    return Attention(width=8, heads=2, source_width=6).double()


def test_heads_are_split_and_merged_back() -> None:
    x = torch.randn(2, 3, 8)
    assert split_heads(x, 4).shape == (2, 4, 3, 2)
    assert torch.equal(split_heads(x, 4)[:, 1], x[:, :, 2:4])
    assert torch.equal(merge_heads(split_heads(x, 4)), x)


def test_attention_is_softmax_over_what_may_be_seen(attention: Attention) -> None:
    x, source = torch.randn(2, 3, 8, dtype=torch.double), torch.randn(2, 5, 6, dtype=torch.double)
    seen = torch.rand(2, 3, 5) > 0.4
    seen[:, :, 0] = True
    found = attention(x, attention.keys_values(source), seen[:, None])
    for b in range(2):
        k, v = attention.key(source[b]), attention.value(source[b])
        wanted = attention.out(slow_attention(attention.query(x[b]), k, v, heads=2, seen=seen[b].tolist()))
        torch.testing.assert_close(found[b], wanted)


def test_rows_that_share_a_source_see_it_as_if_it_were_repeated(attention: Attention) -> None:
    x, source = torch.randn(6, 4, 8, dtype=torch.double), torch.randn(2, 5, 6, dtype=torch.double)
    grouped = attention(x, attention.keys_values(source))
    repeated = attention(x, attention.keys_values(source.repeat_interleave(3, dim=0)))
    torch.testing.assert_close(grouped, repeated)
    assert not torch.allclose(grouped, attention(x, attention.keys_values(source.repeat(3, 1, 1))))


def test_attention_drops_weights_while_training_only() -> None:
    torch.manual_seed(0)
    attention = Attention(8, 2, 8, dropout=0.5)
    x = torch.randn(1, 6, 8)
    train = [attention(x, attention.keys_values(x)) for _ in range(2)]
    attention.eval()
    rest = [attention(x, attention.keys_values(x)) for _ in range(2)]
    assert not torch.equal(*train)
    assert torch.equal(*rest)


def test_fused_self_attention_is_attention_to_oneself() -> None:
    torch.manual_seed(0)
    fused = FusedSelfAttention(8, 2).double()
    x = torch.randn(4, 8, dtype=torch.double)
    q, k, v = fused.qkv(x).split(8, dim=1)
    torch.testing.assert_close(fused(x[None])[0], fused.out(slow_attention(q, k, v, heads=2)))


def test_the_feed_forward_has_the_exact_gelu() -> None:
    torch.manual_seed(0)
    block = FeedForward(3, 5).double()
    x = torch.randn(3, dtype=torch.double)
    inner = [h * (1 + math.erf(h / math.sqrt(2))) / 2 for h in block.up(x).tolist()]
    torch.testing.assert_close(block(x), block.down(torch.tensor(inner, dtype=torch.double)))


class TestStochasticDepth:
    def test_drops_whole_rows_and_keeps_the_mean(self) -> None:
        torch.manual_seed(0)
        drawn = stochastic_depth(torch.ones(4000, 2, 3), 0.25)
        assert drawn is not None
        assert drawn.shape == (2, 4000, 1, 1)
        torch.testing.assert_close(drawn.unique(), torch.tensor([0.0, 1 / 0.75]))
        dropped = float((drawn == 0).float().mean())
        assert dropped == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 8000))
        assert not torch.equal(drawn[0], drawn[1])

    def test_is_not_there_at_rate_0(self) -> None:
        x = torch.randn(8, 2, 3)
        assert stochastic_depth(x, 0.0) is None


class TestPacking:
    LENGTHS = (3, 1, 5)

    def test_pads_with_zeros_and_packs_back(self) -> None:
        packing = Packing(self.LENGTHS, torch.device("cpu"))
        x = torch.arange(1.0, 19).view(9, 2)
        padded = packing.pad(x)
        assert padded.shape == (3, 5, 2)
        for row, part in zip(padded, x.split(self.LENGTHS), strict=True):
            assert torch.equal(row[: len(part)], part)
            assert not row[len(part) :].any()
        assert torch.equal(packing.pack(padded), x)
        assert packing.mask_BT.sum(dim=1).tolist() == [3, 1, 5]
        assert torch.equal(x[packing.cls_states], padded[:, 0])

    def test_attention_sees_the_same_packed_and_alone(self, attention: Attention) -> None:
        packing = Packing(self.LENGTHS, torch.device("cpu"))
        x, source = torch.randn(9, 8, dtype=torch.double), torch.randn(9, 6, dtype=torch.double)
        keys_values = attention.keys_values(source, packing)
        found = attention(x, keys_values, packing.mask_BT[:, None, None], packing)
        own = zip(x.split(self.LENGTHS), source.split(self.LENGTHS), strict=True)
        wanted = [attention(a[None], attention.keys_values(b[None]))[0] for a, b in own]
        torch.testing.assert_close(found, torch.cat(wanted), atol=1e-12, rtol=0)


WITH_BF16 = pytest.mark.skipif(not multiplies_bf16(), reason="this CPU does not multiply bf16")


@WITH_BF16
@pytest.mark.parametrize("masked", [False, True])
@torch.inference_mode()
def test_many_queries_in_bf16_give_what_fused_attention_gives_and_the_same_bits_among_any_rows(
    monkeypatch: pytest.MonkeyPatch, masked: bool
) -> None:
    torch.manual_seed(0)
    q, k, v = (split_heads(part, 6) for part in torch.randn(4, 197, 3 * 384).to(torch.bfloat16).chunk(3, dim=-1))
    mask = torch.arange(197) < torch.tensor([197, 5, 1, 60])[:, None, None, None] if masked else None
    wanted = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)  # slow here
    every = attend(q, k, v, mask)
    torch.testing.assert_close(every.double(), wanted, atol=0.03, rtol=0.03)
    for rows in (slice(1), slice(2, 4), slice(1, 4)):
        assert torch.equal(attend(q[rows], k[rows], v[rows], mask if mask is None else mask[rows]), every[rows])
    assert masked or torch.equal(attend(q, k, v, torch.ones(1, 1, 1, 197, dtype=torch.bool)), every)


@WITH_BF16
@torch.inference_mode()
def test_few_queries_in_bf16_give_what_fused_attention_gives_and_the_same_bits_among_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    attention = Attention(width=128, heads=2, source_width=48)
    x, source = torch.randn(10 * 10, 1, 128), torch.randn(10, 197, 48)
    wanted = attention(x, attention.keys_values(source))
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)  # slow here
    with torch.autocast("cpu", dtype=torch.bfloat16):
        keys = attention.keys_values(source)
        every = attention(x, keys)
        assert torch.allclose(every.float(), wanted, atol=0.02)
        for images in (1, 3, 10):
            for texts in (1, 3, 7, 10):  # of each image
                rows = torch.arange(images * 10).view(images, 10)[:, :texts].flatten()
                some = attention(x[rows], tuple(part[:images] for part in keys))
                assert torch.equal(some, every[rows]), (images, texts)


@WITH_BF16
@pytest.mark.parametrize("queries", [1, 20])
def test_a_training_s_passes_without_gradients_round_and_drop_as_those_with_gradients_do(queries: int) -> None:
    """What gradient caching takes losses of is what it carries their gradients back through."""
    attention = Attention(width=64, heads=2, source_width=64, dropout=0.5).train()
    x = torch.randn(3, queries, 64, generator=torch.Generator().manual_seed(0))
    passes = []
    for with_gradients in (True, False):
        torch.manual_seed(1)
        with torch.set_grad_enabled(with_gradients), torch.autocast("cpu", dtype=torch.bfloat16):
            passes.append(attention(x, attention.keys_values(x)).detach())
    assert torch.equal(*passes)


@pytest.mark.parametrize("format_", [torch.float32, pytest.param(torch.bfloat16, marks=WITH_BF16)])
@torch.inference_mode()
def test_few_queries_read_tokens_as_they_read_keys_and_values_and_the_same_bits_among_any_rows(
    format_: torch.dtype,
) -> None:
    torch.manual_seed(0)
    attention = Attention(width=256, heads=2, source_width=384)
    x, source = torch.randn(11 * 2, 3, 256), torch.randn(11, 50, 384)
    assert attention.tokens_instead(source, 6) is None, "weights that may change"
    pack(attention)
    assert attention.tokens_instead(source, 129) is None, "more queries than a head is wide"
    wanted = attention(x, attention.keys_values(source))
    with autocast(torch.device("cpu"), format_):
        tokens = attention.tokens_instead(source, 6)
        assert tokens is not None
        every = attention(x, tokens)
        near = 1e-5 if format_ == torch.float32 else 2e-2
        torch.testing.assert_close(every.float(), wanted, atol=near, rtol=near)
        for images in (1, 2, 7):
            some = attention(x[-2 * images :], (tokens[0][-images:],) * 2)
            assert torch.equal(some, every[-2 * images :]), images
