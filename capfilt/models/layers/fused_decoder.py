"""The decoder of BLIP, ALBEF and X-VLM laid out anew to write texts on a GPU: 11 kernels a layer and step, no casts.

All of it is held in the format of the matrix products. Queries, keys and values are one product, written where the
cache has them; a product adds itself to the residual stream. A product that does so has no room for its bias, so that
the norm before it adds the bias in advance, and the product that reads the norm subtracts it again in its own bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capfilt.models.layers.attention import KeysValues
from capfilt.models.layers.bert import TextTransformer, check_length
from capfilt.models.layers.image_context import ImageContext

IMPOSSIBLE = -1e30
"""The logit of what cannot come next: finite, so that infinity is always a fault."""


class Product(NamedTuple):
    """x [P, I] -> x @ weight + bias [P, O]."""

    weight_IO: Tensor
    bias_O: Tensor

    def __call__(self, x_PI: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.addmm(self.bias_O, x_PI, self.weight_IO, out=out)

    def gelu(self, x_PI: Tensor) -> Tensor:
        """GELU of it. In bf16 a GPU computes both at once, and approximates by tanh: wrong by 0.0005 at most, and one
        rounding less."""
        if x_PI.dtype == torch.bfloat16:
            return torch._addmm_activation(self.bias_O, x_PI, self.weight_IO, use_gelu=True)
        return F.gelu(self(x_PI))


class Norm(NamedTuple):
    """LayerNorm over the last axis; its sums are taken in fp32."""

    weight_D: Tensor
    bias_D: Tensor
    eps: float

    def __call__(self, x_PD: Tensor) -> Tensor:
        return F.layer_norm(x_PD, self.weight_D.shape, self.weight_D, self.bias_D, self.eps)


class SubBlock(NamedTuple):
    """What one of the three parts of a layer computes with: `norm(x + last(... first(x)))`, bias of `last` in x."""

    first: Product
    last_ID: Tensor
    norm: Norm

    def end(self, x_PD: Tensor, inner_PI: Tensor) -> Tensor:
        """Add what the sub-block computed to its input, in place, and normalise."""
        return self.norm(x_PD.addmm_(inner_PI, self.last_ID))


class FusedDecoder:
    """A stack's decoder with copies of its weights, for generation alone: the stack must not learn meanwhile.

    The states are those of `TextTransformer.forward` up to rounding. In bf16 the residual stream is bf16 too, where
    autocast keeps it in fp32. Shape letters: R rows, T new positions, S positions so far, G rows an image, P = T * R
    places with the rows of a position adjacent.
    """

    def __init__(self, stack: TextTransformer, dtype: torch.dtype):
        assert stack.head is not None, "a model without the decoder role cannot decode"
        assert not stack.training, "dropout is left out"
        config, self.dtype = stack.config, dtype
        self.heads, self.width, self.vocabulary = config.heads, config.width, config.vocab_size
        self.below, self.depth, self.most = config.fusion_layer, config.depth, config.max_positions
        embeddings: Any = stack.embeddings.of("decoder")
        positions = embeddings.positions.weight.detach()
        if embeddings.types is not None:
            positions = positions + embeddings.types.weight[0].detach()
        self.words_VD, self.positions_TD = embeddings.words.weight.detach().to(dtype), positions.to(dtype)
        parts = list(_parts(stack))
        self.embedded, shift = _norm(embeddings.norm, parts[0][1].bias, dtype)
        self.parts = []
        following: list[Any] = [last.bias for _, last, _ in parts[1:]]
        for (first, last, norm), bias in zip(parts, [*following, None], strict=True):
            product = _product(first, shift, dtype)
            normed, shift = _norm(norm, bias, dtype)
            self.parts.append(SubBlock(product, last.weight.detach().to(dtype).t(), normed))
        head, weight = stack.head, stack.output_layer().weight_VD
        self.transform, (self.head_norm, _) = _product([head.transform], shift, dtype), _norm(head.norm, None, dtype)
        words_VD = self.words_VD if stack.head.weight is None else weight.detach().to(dtype)
        self.output_DV, bias_V = words_VD.t(), head.bias.detach()
        # In fp32 at least, where logits become so.
        self.bias_V = bias_V.to(torch.promote_types(dtype, torch.float32))
        self._bias_without: dict[int, Tensor] = {}

    def cache_shape(self, rows: int, length: int) -> tuple[int, ...]:
        """What `step` keeps: queries, keys and values of every layer and position."""
        return self.depth, length, rows, 3 * self.width

    @torch.no_grad()
    def step(
        self, ids_RT: Tensor, start: int, image: ImageContext, cache_LSRE: Tensor, without: int | None = None
    ) -> Tensor:
        """Feed the tokens at the positions from `start` on and return the logits after the last of them [R, V], in fp32
        at least; IMPOSSIBLE for a token that is left out.

        Several at once are for the beginning of a text. `image` is in the decoder's format; rows that share one are
        adjacent. Nothing is allocated by a size that the data decides, and no address of what is kept changes.
        """
        rows, new = ids_RT.shape
        assert start == 0 or new == 1, "a text goes on by one token"
        check_length(start + new, self.most)
        with torch.autocast(cache_LSRE.device.type, enabled=False):
            embedded = F.embedding(ids_RT.t(), self.words_VD) + self.positions_TD[start : start + new, None]
            x_PD, parts = self.embedded(embedded).view(new * rows, self.width), iter(self.parts)
            for layer in range(self.depth):
                part = next(parts)
                x_PD = part.end(x_PD, self._attend_text(part.first, x_PD, cache_LSRE[layer], start, new))
                if layer >= self.below:
                    part, keys_values = next(parts), image.layers[layer - self.below]
                    x_PD = part.end(x_PD, self._attend_image(part.first, x_PD, keys_values, new))
                part = next(parts)
                x_PD = part.end(x_PD, part.first.gelu(x_PD))
            states_RD = self.head_norm(self.transform.gelu(x_PD[-rows:]))
            return states_RD @ self.output_DV + self._bias(without)

    def _bias(self, without: int | None) -> Tensor:
        """The bias of the logits [V], by which a token can be made impossible."""
        if without is None:
            return self.bias_V
        if without not in self._bias_without:
            self._bias_without[without] = self.bias_V.clone()
            self._bias_without[without][without] = IMPOSSIBLE
        return self._bias_without[without]

    def _attend_text(self, qkv: Product, x_PD: Tensor, cache_SRE: Tensor, start: int, new: int) -> Tensor:
        """Self-attention [P, D] to all positions so far, of which the new ones enter the cache."""
        end, rows = start + new, cache_SRE.shape[1]
        qkv(x_PD, out=cache_SRE[start:end].view(new * rows, -1))
        kept_3RHSd = cache_SRE[:end].view(end, rows, 3, self.heads, -1).permute(2, 1, 3, 0, 4)
        query, key, value = kept_3RHSd.unbind(0)
        y = F.scaled_dot_product_attention(query[:, :, start:], key, value, is_causal=new > 1)
        return y.permute(2, 0, 1, 3).reshape(x_PD.shape)

    def _attend_image(self, query: Product, x_PD: Tensor, keys_values: KeysValues, new: int) -> Tensor:
        """Cross-attention [P, D]: rows that share an image are query positions of one row."""
        images = len(keys_values[0])
        q = query(x_PD).view(new, images, -1, self.heads, self.width // self.heads)
        y_IHQd = F.scaled_dot_product_attention(q.permute(1, 3, 0, 2, 4).flatten(2, 3), *keys_values)
        y: Tensor = y_IHQd.unflatten(2, (new, -1))
        return y.permute(2, 0, 3, 1, 4).reshape(x_PD.shape)


def _parts(stack: TextTransformer) -> Sequence[tuple[list[Any], Any, Any]]:
    """(what reads the input, what is added to it, the norm) of every sub-block, in order."""
    found: list[tuple[list[Any], Any, Any]] = []
    layer: Any
    for n, layer in enumerate(stack.layers):
        own, feed = layer.self_attention.of("decoder"), layer.feed_forward.of("decoder")
        found.append(([own.block.query, own.block.key, own.block.value], own.block.out, own.norm))
        if n >= stack.config.fusion_layer:
            cross = layer.cross_attention.of("decoder")
            found.append(([cross.block.query], cross.block.out, cross.norm))
        found.append(([feed.block.up], feed.block.down, feed.norm))
    return found


@torch.no_grad()
def _product(linears: Sequence[nn.Linear], shift_D: Tensor, dtype: torch.dtype) -> Product:
    """Linear layers side by side, of inputs to which `shift` was added."""
    weight = torch.cat([linear.weight for linear in linears]).to(dtype)
    bias = torch.cat([linear.bias for linear in linears]).double() - weight.double() @ shift_D
    return Product(weight.t(), bias.to(dtype))


@torch.no_grad()
def _norm(norm: nn.LayerNorm, add_D: Tensor | None, dtype: torch.dtype) -> tuple[Norm, Tensor]:
    """A norm that adds a bias to what it gives, and by how much that differs from what it gave (float64 [D])."""
    bias = (norm.bias if add_D is None else norm.bias + add_D).to(dtype)
    return Norm(norm.weight.detach().to(dtype), bias, norm.eps), bias.double() - norm.bias.double()
