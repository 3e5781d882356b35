"""The Q-Former of BLIP-2 (section 3.1): learned queries that attend to an image, in one BERT with the texts.

Queries and texts share self-attention. Only the queries have cross-attention to the image, in every second layer, and
they have feed-forward layers for themselves. The method decides who attends to whom: queries alone (`run_queries`), a
text alone (`read`), both to each other (`encode_multimodal`), or a text from left to right after the queries (`write`).

The keys and values of the queries in self-attention are all that a decoder needs of an image: queries never attend to a
text that is written, so they are computed once for all texts and all steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capfilt.models.blip2.config import QFormerConfig
from capfilt.models.layers.attention import Attention, FeedForward, KeysValues
from capfilt.models.layers.bert import Cache, LanguageHead, Residual, check_length, initialise, self_attention_mask
from capfilt.models.layers.image_context import ImageContext


class QFormerLayer(nn.Module):
    """Self-attention for all, cross-attention and a feed-forward for queries, another feed-forward for texts."""

    def __init__(self, config: QFormerConfig, image_width: int, crosses: bool):
        super().__init__()

        def attention(source_width: int) -> Residual:
            return Residual(Attention(config.width, config.heads, source_width, config.dropout), config)

        def feed_forward() -> Residual:
            return Residual(FeedForward(config.width, config.hidden), config)

        self.self_attention = attention(config.width)
        self.cross_attention = attention(image_width) if crosses else None
        self.query_feed_forward = feed_forward()
        self.feed_forward = feed_forward() if config.roles else None

    def self_keys_values(self, x_BTD: Tensor) -> KeysValues:
        """Keys and values of queries or words, for self-attention."""
        return self.self_attention.block.keys_values(x_BTD)  # type: ignore[operator]

    def queries(
        self, x_BQD: Tensor, keys_values: KeysValues, image: KeysValues | None, mask: Tensor | None = None
    ) -> Tensor:
        """Queries that attend to `keys_values`, and to the image in a layer with cross-attention."""
        x_BQD = self.self_attention(x_BQD, keys_values, mask)
        if self.cross_attention is not None:
            x_BQD = self.cross_attention(x_BQD, image)
        return self.query_feed_forward(x_BQD)

    def words(self, x_BTD: Tensor, keys_values: KeysValues, mask: Tensor | None) -> Tensor:
        """Words that attend to `keys_values`."""
        assert self.feed_forward is not None, "a Q-Former without texts was given one"
        return self.feed_forward(self.self_attention(x_BTD, keys_values, mask))


class QFormer(nn.Module):
    """The stack. `image` is what `image_context` projects, a pair for each layer with cross-attention."""

    def __init__(self, config: QFormerConfig, image_width: int):
        super().__init__()
        self.config = config
        self.query_tokens = nn.Parameter(torch.empty(1, config.queries, config.width))
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            QFormerLayer(config, image_width, n % config.cross_every == 0) for n in range(config.depth)
        )
        self.words = nn.Embedding(config.vocab_size, config.width, padding_idx=0) if config.roles else None
        self.positions = nn.Embedding(config.max_positions, config.width) if config.roles else None
        self.head = LanguageHead(config) if "decoder" in config.roles else None
        self.apply(partial(initialise, std=config.init_std))
        nn.init.normal_(self.query_tokens, std=0.02)

    def image_context(self, tokens_BND: Tensor) -> ImageContext:
        """Project image tokens for every layer with cross-attention."""
        crossing = (layer.cross_attention for layer in self.layers if layer.cross_attention is not None)
        pairs = (attention.block.keys_values(tokens_BND) for attention in crossing)  # type: ignore[operator, union-attr]
        return ImageContext.of_layers(pairs)

    def run_queries(self, image: ImageContext) -> tuple[Tensor, ImageContext]:
        """Queries beside images -> their states [B, Q, D], and what a text may attend to of them, in every layer."""
        x_BQD = self._queries(image.rows)
        image_layers, of_queries = iter(image.layers), []
        for layer in self.layers:
            keys_values = layer.self_keys_values(x_BQD)  # type: ignore[operator]
            of_queries.append(keys_values)
            x_BQD = layer.queries(x_BQD, keys_values, _next(layer, image_layers))  # type: ignore[operator]
        return x_BQD, ImageContext.of_layers(of_queries)

    def read(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Texts alone, both ways -> states [B, T, D]."""
        x_BTD, mask = self._embed(ids_BT), mask_BT.bool()[:, None, None, :]
        for layer in self.layers:
            x_BTD = layer.words(x_BTD, layer.self_keys_values(x_BTD), mask)  # type: ignore[operator]
        return x_BTD

    def encode_multimodal(self, ids_BT: Tensor, mask_BT: Tensor, image: ImageContext) -> Tensor:
        """Queries and texts that attend to each other, both ways -> the queries' states [B, Q, D].

        There may be several texts for each image: rows that share one are adjacent.
        """
        x_BTD, x_BQD = self._embed(ids_BT), self._queries(ids_BT.shape[0])
        mask = F.pad(mask_BT.bool(), (self.config.queries, 0), value=True)[:, None, None, :]
        image_layers = iter(image.layers)
        for n, layer in enumerate(self.layers):
            keys_values = _join(layer.self_keys_values(x_BQD), layer.self_keys_values(x_BTD))  # type: ignore[operator]
            x_BQD = layer.queries(x_BQD, keys_values, _next(layer, image_layers), mask)  # type: ignore[operator]
            if n + 1 < self.config.depth:  # what the words become in the last layer is not used
                x_BTD = layer.words(x_BTD, keys_values, mask)  # type: ignore[operator]
        return x_BQD

    def write(self, ids_BT: Tensor, mask_BT: Tensor | None, image: ImageContext, cache: Cache | None = None) -> Tensor:
        """Texts left to right after the queries -> states [B, T, D]; `image` is what `run_queries` left.

        With `cache`, `ids_BT` are the newest positions only, as in TextTransformer. Rows that share an image are
        adjacent.
        """
        start = cache.start if cache is not None else 0
        x_BTD = self._embed(ids_BT, start)
        mask = self_attention_mask(ids_BT, mask_BT, causal=True, start=start)
        if mask is not None:
            mask = F.pad(mask, (self.config.queries, 0), value=True)
        for n, (layer, of_queries) in enumerate(zip(self.layers, image.layers, strict=True)):
            keys_values = layer.self_keys_values(x_BTD)  # type: ignore[operator]
            keys_values = cache.extend(n, keys_values) if cache is not None else keys_values
            joined = _join(_for_rows(of_queries, ids_BT.shape[0]), keys_values)
            x_BTD = layer.words(x_BTD, joined, mask)  # type: ignore[operator]
        if cache is not None:
            cache.start += ids_BT.shape[1]
        return x_BTD

    def logits(self, states_BTD: Tensor) -> Tensor:
        """States of `write` [B, T, D] -> next-token logits [B, T, V]; the output matrix is the word embeddings."""
        assert self.head is not None, "a Q-Former without the decoder role cannot decode"
        assert self.words is not None
        return self.head(states_BTD, self.words.weight)

    def _queries(self, rows: int) -> Tensor:
        return self.dropout(self.norm(self.query_tokens.expand(rows, -1, -1)))

    def _embed(self, ids_BT: Tensor, start: int = 0) -> Tensor:
        """Words plus positions, which begin at 0 whatever the queries; the norm is the queries' too."""
        assert self.words is not None, "a Q-Former without texts was given one"
        assert self.positions is not None
        end = start + ids_BT.shape[1]
        check_length(end, self.config.max_positions)
        return self.dropout(self.norm(self.words(ids_BT) + self.positions.weight[start:end]))


def _next(layer: nn.Module, image_layers: Iterator[KeysValues]) -> KeysValues | None:
    return next(image_layers) if layer.cross_attention is not None else None


def _join(first: KeysValues, second: KeysValues) -> KeysValues:
    """Keys and values of two sequences as of one."""
    one, other = (torch.cat(pair, dim=2) for pair in zip(first, second, strict=True))
    return one, other


def _for_rows(keys_values: KeysValues, rows: int) -> KeysValues:
    """Those of each image for every one of its rows."""
    times = rows // keys_values[0].shape[0]
    if times == 1:
        return keys_values
    return keys_values[0].repeat_interleave(times, dim=0), keys_values[1].repeat_interleave(times, dim=0)
