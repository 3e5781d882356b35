"""The pieces that several architectures are made of: attention, feed-forward, stochastic depth.

Keys and values are computed apart from the queries, because what is attended to (an image) is often shared by many
rows (its candidate texts, their steps) and must then be projected once only. Shape letters: B rows, T text positions,
S source positions, N image tokens, P packed positions, D width, H heads, d = D / H.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capfilt.models.layers.config import Activation
from capfilt.models.layers.packed_linear import PackedLinear, linear, linear_gelu, multiplies_bf16, product_format
from capfilt.models.layers.transfer import to_device

KeysValues = tuple[Tensor, Tensor]
"""Projected keys and values of one attention layer, each [B, H, S, d]; or twice the tokens that they would be projected
from, [B, S, source_width] (`Attention.tokens_instead`)."""


def split_heads(x_BTD: Tensor, heads: int) -> Tensor:
    """[B, T, D] -> [B, H, T, d]."""
    B, T, D = x_BTD.shape
    return x_BTD.view(B, T, heads, D // heads).transpose(1, 2)


def merge_heads(x_BHTd: Tensor) -> Tensor:
    """[B, H, T, d] -> [B, T, D]."""
    B, H, T, d = x_BHTd.shape
    return x_BHTd.transpose(1, 2).reshape(B, T, H * d)


class Packing:
    """Sequences of unequal lengths laid end to end [P, D], and where they stand as padded rows [B, T, D].

    Linear layers work on the packed form, where there is no padding; attention on the padded one. `cls_states` [B] is
    where each sequence begins.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device):
        count, total = torch.tensor(lengths), sum(lengths)
        B, T = self.shape = len(lengths), max(lengths)
        begin = count.cumsum(0) - count
        row = torch.arange(B).repeat_interleave(count, output_size=total)
        index = row * T + torch.arange(total) - begin[row]
        # One copy to the device, and not three.
        count, self.cls_states, self._index = to_device(torch.cat([count, begin, index]), device).split([B, B, total])
        self.mask_BT = torch.arange(T, device=device) < count[:, None]
        """True where a row has a token."""

    def pad(self, x_PD: Tensor) -> Tensor:
        """[P, D] -> [B, T, D], zeros in the gaps."""
        B, T = self.shape
        return x_PD.new_zeros(B * T, x_PD.shape[1]).index_copy_(0, self._index, x_PD).view(B, T, -1)

    def pack(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [P, D]."""
        return x_BTD.flatten(0, 1)[self._index]


FEW = 16
"""Queries of a row up to which keys and values are multiplied as they lie in memory, since copies would cost more."""

ROOM = 2**18
"""Scores that are multiplied at a time: those of one picture (197 tokens, 6 heads) stay in a core's cache."""


def attend(
    q_BHTd: Tensor, k_BHSd: Tensor, v_BHSd: Tensor, mask: Tensor | None = None, causal: bool = False, dropout: float = 0
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v -> [B, H, T, d]; `mask` and `causal` as of `FusedSelfAttention`.

    In bf16 on a CPU that multiplies it, two products take the place of torch's fused kernel, which needs half as long
    again for a picture's tokens and seven times as long for one query. Scores are then rounded to bf16: with a standard
    deviation of 4 the result is 1.1 % off in place of 0.6 %. A row's bits depend neither on how many rows there are nor
    on how many queries a row has, as long as these stay few. In inference mode alone: what a training computes without
    gradients, for its momentum copy or to compute it again, is to be what it computes with them.
    """
    here = q_BHTd.dtype == torch.bfloat16 and q_BHTd.device.type == "cpu" and multiplies_bf16()
    if here and not causal and torch.is_inference_mode_enabled():
        return _by_products(q_BHTd, k_BHSd, v_BHSd, mask)
    return F.scaled_dot_product_attention(q_BHTd, k_BHSd, v_BHSd, mask, dropout_p=dropout, is_causal=causal)


def _by_products(q_BHTd: Tensor, k_BHSd: Tensor, v_BHSd: Tensor, mask: Tensor | None) -> Tensor:
    """`attend` for as many rows at a time as there is room for."""
    B, H, T, d = q_BHTd.shape
    rows = max(1, ROOM // (H * T * k_BHSd.shape[2]))
    # Laid out as the heads are merged.
    y_BHTd = q_BHTd.new_empty(B, T, H, d).transpose(1, 2)
    for start in range(0, B, rows):
        part = slice(start, start + rows)
        q, k, v = (x[part] if T <= FEW else x[part].contiguous() for x in (q_BHTd, k_BHSd, v_BHSd))
        scores = (q * d**-0.5) @ k.transpose(-2, -1)
        if mask is not None:
            scores.masked_fill_(~(mask[part] if len(mask) == B else mask), torch.finfo(scores.dtype).min)
        y_BHTd[part] = scores.softmax(dim=-1) @ v
    return y_BHTd


class FusedSelfAttention(nn.Module):
    """Self-attention with one projection for queries, keys and values, as in the public ViTs.

    Without `key_bias` (EVA) the keys' third of the bias is there, as checkpoints have it, and counts for nothing.
    `causal`: a token sees itself and those before it alone (CLIP's texts).
    """

    def __init__(self, width: int, heads: int, key_bias: bool = True, causal: bool = False):
        super().__init__()
        self.heads = heads
        self.key_bias, self.causal = key_bias, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BND: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend; `mask` is boolean, True = may be seen, broadcastable to [B, 1, N, N]; not of a causal one."""
        if self.key_bias:
            qkv = self.qkv(x_BND)
        else:
            query, key, value = self.qkv.bias.chunk(3)
            qkv = linear(self.qkv, x_BND, torch.cat([query, torch.zeros_like(key), value]))
        q, k, v = (split_heads(part, self.heads) for part in qkv.chunk(3, dim=-1))
        y = attend(q, k, v, mask, self.causal)
        return self.out(merge_heads(y))


class Attention(nn.Module):
    """Attention whose source may be another sequence, of another width, with fewer rows than the queries.

    Rows of `x` that share a source row must be adjacent: `x` has B = groups * B_source rows.
    """

    def __init__(self, width: int, heads: int, source_width: int, dropout: float = 0.0):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source_width, width)
        self.value = nn.Linear(source_width, width)
        self.out = nn.Linear(width, width)

    def keys_values(self, source_BSD: Tensor, packing: Packing | None = None) -> KeysValues:
        """Project what is attended to; [B, S, source_width], or [P, source_width] packed -> two of [B, H, S, d]."""
        keys, values = self.key(source_BSD), self.value(source_BSD)
        if packing is not None:
            keys, values = packing.pad(keys), packing.pad(values)
        return split_heads(keys, self.heads), split_heads(values, self.heads)

    def forward(
        self, x_BTD: Tensor, keys_values: KeysValues, mask: Tensor | None = None, packing: Packing | None = None
    ) -> Tensor:
        """Attend; `mask` is boolean, True = may be seen, broadcastable to [B, 1, T, S].

        With `packing`, `x` is [P, D] and the packing's rows are those of the source.
        """
        if packing is not None:
            return self._packed(x_BTD, keys_values, mask, packing)
        k, v = keys_values
        if k.ndim == 3:
            assert mask is None, "all tokens are read"
            return self._from_tokens(x_BTD, k)
        B, T, D = x_BTD.shape
        groups = B // k.shape[0]
        # Rows that share a source become more query positions of one row: nothing is copied, and without a causal
        # mask (this is cross-attention) the answer is the same.
        q = split_heads(self.query(x_BTD).view(B // groups, groups * T, D), self.heads)
        dropout = self.dropout if self.training else 0.0
        y = attend(q, k.to(q.dtype), v.to(q.dtype), mask, dropout=dropout)
        return self.out(merge_heads(y).view(B, T, D))

    def tokens_instead(self, tokens_BSE: Tensor, queries: int) -> KeysValues | None:
        """What takes the place of `keys_values` for so many queries of a row in all; None: nothing does.

        On a CPU, with weights that change no more. Where a row has fewer queries than a head is wide it is less work
        to take queries to the tokens and back, q (x W)^T = (q W^T) x^T, than to project all tokens.
        """
        key, value = self.key, self.value
        if queries > key.out_features // self.heads or not (
            isinstance(key, PackedLinear) and isinstance(value, PackedLinear) and key.multiply.usable(tokens_BSE)
        ):
            return None
        tokens_BSE = tokens_BSE.to(product_format(tokens_BSE))
        return tokens_BSE, tokens_BSE

    def _from_tokens(self, x_BTD: Tensor, tokens_NSE: Tensor) -> Tensor:
        """`forward` beside tokens in place of keys and values, rows of an image adjacent.

        The bias of keys moves all scores of a query alike, and drops out. From four rows on a row's bits do not depend
        on how many there are. Letters: N images, Q queries of one, R of all, E width of a token.
        """
        (B, T, D), (N, _, E), H = x_BTD.shape, tokens_NSE.shape, self.heads
        assert isinstance(self.key, PackedLinear), "as asked by tokens_instead"
        assert isinstance(self.value, PackedLinear), "as asked by tokens_instead"
        into_HdE, out_HdE = (part.multiply.plain(tokens_NSE.dtype).view(H, -1, E) for part in (self.key, self.value))
        q_HRd = (self.query(x_BTD) * (D // H) ** -0.5).view(B * T, H, -1).transpose(0, 1)
        q_NQE = torch.bmm(q_HRd, into_HdE).view(H, N, -1, E).transpose(0, 1).reshape(N, -1, E)
        weights_NQS = torch.bmm(q_NQE, tokens_NSE.transpose(1, 2)).softmax(dim=-1)
        read_NQE = torch.bmm(weights_NQS, tokens_NSE)
        read_HRE = read_NQE.view(N, H, -1, E).transpose(0, 1).reshape(H, B * T, E)
        y_HRd = torch.bmm(read_HRE, out_HdE.transpose(1, 2))
        out: Tensor = self.out(y_HRd.transpose(0, 1).reshape(B, T, D) + self.value.bias)
        return out

    def _packed(self, x_PD: Tensor, keys_values: KeysValues, mask: Tensor | None, packing: Packing) -> Tensor:
        k, v = keys_values
        q = split_heads(packing.pad(self.query(x_PD)), self.heads)
        y = attend(q, k.to(q.dtype), v.to(q.dtype), mask)
        return self.out(packing.pack(merge_heads(y)))


@contextmanager
def explicit_weights(attention: Attention) -> Iterator[list[Tensor]]:
    """Within it `attention` computes its weights as a tensor, which the fused kernel never does, and each call adds
    them to the list: [B_source, H, groups * T, S], a leaf that gradients of what comes after it can be taken by.

    The same numbers up to rounding, for inference on padded texts. Nothing else changes, and nothing stays.
    """
    kept: list[Tensor] = []

    def replace(_: nn.Module, inputs: tuple[Any, ...], __: Tensor) -> Tensor:
        x_BTD, (k, v), mask = inputs[0], inputs[1], inputs[2] if len(inputs) > 2 else None
        q = split_heads(attention.query(x_BTD).view(k.shape[0], -1, x_BTD.shape[-1]), attention.heads)
        scores = q @ k.to(q.dtype).transpose(-2, -1) / q.shape[-1] ** 0.5
        scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
        kept.append(scores.softmax(dim=-1).detach().requires_grad_())
        return attention.out(merge_heads(kept[-1].to(v.dtype) @ v).view(x_BTD.shape))

    hook = attention.register_forward_hook(replace)
    try:
        yield kept
    finally:
        hook.remove()


class FeedForward(nn.Module):
    """Two linear layers with an exact GELU between, or OpenAI's QuickGELU, and a dropout behind it (ViLT)."""

    def __init__(self, width: int, hidden: int, activation: Activation = "gelu", dropout: float = 0.0):
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(hidden, width)
        self.exact = activation == "gelu"

    def forward(self, x: Tensor) -> Tensor:
        hidden = linear_gelu(self.up, x) if self.exact else quick_gelu(self.up(x))
        return self.down(self.dropout(hidden))


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), as OpenAI's CLIP and transformers compute it."""
    return x * torch.sigmoid(1.702 * x)


def stochastic_depth(x_BND: Tensor, rate: float) -> Tensor | None:
    """Factors of a block's two residual branches, [2, B, 1, 1]: at this rate 0 for whole rows, and the larger for the
    others, so that the mean stays. None at rate 0."""
    if rate == 0.0:
        return None
    keep = 1.0 - rate
    rows = [torch.empty(len(x_BND), 1, 1, device=x_BND.device, dtype=x_BND.dtype) for _ in range(2)]
    return torch.stack([row.bernoulli_(keep).div_(keep) for row in rows])
