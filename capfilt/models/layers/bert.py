"""The text transformer of BLIP, ALBEF and X-VLM: one stack that is text encoder, image-grounded encoder and decoder.

What the encoder and the decoder share is an option (BLIP, Table 3). The paper's choice shares all but self-attention:
reading both ways and writing left to right want different self-attention, everything else is the same task. Sharing
is by reference: a shared part exists once, so it is trained, averaged and saved once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capfilt.errors import ModelError
from capfilt.models.layers.attention import Attention, FeedForward, KeysValues, Packing
from capfilt.models.layers.block import Block
from capfilt.models.layers.config import (
    APART,
    BertConfig,
    DecoderConfig,
    EmbeddingsConfig,
    FusionTextConfig,
    Role,
    TextConfig,
)
from capfilt.models.layers.image_context import ImageContext
from capfilt.models.layers.packed_linear import product_format

StackConfig = TextConfig | FusionTextConfig | DecoderConfig


class PerRole(nn.ModuleDict):
    """One module for both roles, or one each."""

    def __init__(self, config: StackConfig, part: str, make: Callable[[], nn.Module]):
        apart = part in APART[config.share]
        super().__init__({role: make() for role in (config.roles if apart else ("shared",))})

    def of(self, role: Role) -> nn.Module:
        """The module that `role` uses."""
        return self["shared"] if "shared" in self else self[role]


class Embeddings(nn.Module):
    """Words plus positions, normalised; plus BERT's first token type, which BLIP leaves out."""

    def __init__(self, config: StackConfig | EmbeddingsConfig):
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, config.width, padding_idx=0)
        self.positions = nn.Embedding(config.max_positions, config.width)
        self.types = nn.Embedding(config.token_types, config.width) if config.token_types else None
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, ids_BT: Tensor, start: int = 0, absolute: bool = True) -> Tensor:
        """Ids -> embeddings [B, T, D]; not `absolute`: positions are left out, in models of relative ones (VLMo)."""
        end = start + ids_BT.shape[1]
        check_length(end, self.positions.num_embeddings)
        words = self.words(ids_BT) if self.types is None else self.words(ids_BT) + self.types.weight[0]
        return self.dropout(self.norm(words + self.positions.weight[start:end] if absolute else words))


def check_length(length: int, most: int) -> None:
    """Refuse a text longer than the positions: slicing would give fewer, which may even broadcast. ModelError."""
    if length > most:
        raise ModelError(f"a text of {length} tokens, and the model has {most} positions; lower max_length to {most}")


class Residual(nn.Module):
    """A sub-block with BERT's ending: dropout, add, then norm (post-norm)."""

    def __init__(self, block: nn.Module, config: BertConfig):
        super().__init__()
        self.block = block
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, *args: object) -> Tensor:
        return self.norm(x_BTD + self.dropout(self.block(x_BTD, *args)))


class Cache:
    """Keys and values of the self-attention of every layer, allocated once for a whole generation.

    Shapes [layers, B, H, length, d]. `start` is how many positions are filled.
    """

    def __init__(self, config: BertConfig, rows: int, length: int, like: Tensor):
        shape = (config.depth, rows, config.heads, length, config.width // config.heads)
        self.keys = like.new_zeros(shape)
        self.values = like.new_zeros(shape)
        self.start = 0

    def extend(self, layer: int, keys_values: KeysValues) -> KeysValues:
        """Append this step's keys and values [B, H, T, d] and return all so far."""
        keys, values = keys_values
        end = self.start + keys.shape[2]
        self.keys[layer, :, :, self.start : end] = keys
        self.values[layer, :, :, self.start : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows (indices or a boolean mask), in this order."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]


class TextLayer(nn.Module):
    """Self-attention, cross-attention to an image (skipped without one), feed-forward."""

    def __init__(self, config: StackConfig, image_width: int, attends: bool = True):
        """`attends`: whether the layer has cross-attention."""
        super().__init__()

        def attention(source_width: int) -> Residual:
            return Residual(Attention(config.width, config.heads, source_width, config.dropout), config)

        self.self_attention = PerRole(config, "self_attention", lambda: attention(config.width))
        if attends:
            self.cross_attention = PerRole(config, "cross_attention", lambda: attention(image_width))
        self.feed_forward = PerRole(
            config, "feed_forward", lambda: Residual(FeedForward(config.width, config.hidden), config)
        )

    def image_context(self, tokens_BND: Tensor, role: Role) -> KeysValues:
        """What the cross-attention of `role` attends to of the images."""
        return self.cross_attention.of(role).block.keys_values(tokens_BND)  # type: ignore[union-attr, operator]

    def key_projections(self, role: Role) -> tuple[nn.Module, nn.Module]:
        """What `image_context` projects with."""
        block = self.cross_attention.of(role).block
        return block.key, block.value  # type: ignore[union-attr, return-value]

    def self_keys_values(self, x_BTD: Tensor, role: Role, packing: Packing | None = None) -> KeysValues:
        """Keys and values of the layer's input, for self-attention."""
        return self.self_attention.of(role).block.keys_values(x_BTD, packing)  # type: ignore[union-attr, operator]

    def forward(
        self,
        x_BTD: Tensor,
        role: Role,
        keys_values: KeysValues,
        mask: Tensor | None,
        image: KeysValues | None,
        image_mask: Tensor | None = None,
    ) -> Tensor:
        x_BTD = self.self_attention.of(role)(x_BTD, keys_values, mask)
        if image is not None:
            x_BTD = self.cross_attention.of(role)(x_BTD, image, image_mask)
        return self.feed_forward.of(role)(x_BTD)

    def fuse_both(
        self,
        x_BTD: Tensor,
        keys_values: KeysValues,
        mask: Tensor | None,
        images: tuple[KeysValues, KeysValues],
        second: Attention,
        merge: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """`forward` of the encoder beside two images, of which `second` attends to the other one; `merge` makes one of
        what the two give."""
        x_BTD = self.self_attention.of("encoder")(x_BTD, keys_values, mask)
        cross = self.cross_attention.of("encoder")
        assert isinstance(cross, Residual)
        both = merge(cross.block(x_BTD, images[0]), second(x_BTD, images[1]))
        return self.feed_forward.of("encoder")(cross.norm(x_BTD + cross.dropout(both)))

    def packed(
        self,
        x_PD: Tensor,
        keys_values: KeysValues,
        mask: Tensor,
        texts: Packing,
        image: KeysValues | None,
        images: Packing,
    ) -> Tensor:
        """`forward` of the encoder on packed texts; `images` packs the same tokens by the image that they attend to."""
        x_PD = self.self_attention.of("encoder")(x_PD, keys_values, mask, texts)
        if image is not None:
            x_PD = self.cross_attention.of("encoder")(x_PD, image, None, images)
        return self.feed_forward.of("encoder")(x_PD)


TEXT_BLOCK = Block(TextLayer, entry_points=("image_context", "self_keys_values", "fuse_both"), repeated=True)


class LanguageHead(nn.Module):
    """BERT's head: a transform, then the output matrix (tied to the word embeddings, or not) and a bias."""

    def __init__(self, config: BertConfig | EmbeddingsConfig):
        super().__init__()
        self.transform = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.weight = None if config.tie_lm_head else nn.Parameter(torch.empty(config.vocab_size, config.width))

    def hidden(self, x_BTD: Tensor) -> Tensor:
        """States [B, T, D] -> what the output matrix multiplies [B, T, D]."""
        return self.norm(F.gelu(self.transform(x_BTD)))

    def forward(self, x_BTD: Tensor, words_VD: Tensor) -> Tensor:
        """States [B, T, D] -> logits [B, T, V]."""
        weight = words_VD if self.weight is None else self.weight
        return F.linear(self.hidden(x_BTD), weight, self.bias)


Head = Callable[[Tensor], Tensor]
"""States [B, D] -> logits [B, V]."""


@dataclass(frozen=True)
class OutputLayer:
    """A head with the matrix that it multiplies by, wherever that matrix is held."""

    head: LanguageHead
    weight_VD: Tensor

    def logits(self, states_BTD: Tensor) -> Tensor:
        """States [B, T, D] -> logits [B, T, V]."""
        return self.head(states_BTD, self.weight_VD)


def initialise(module: nn.Module, std: float) -> None:
    """Draw fresh weights of a stack made like BERT; those of embeddings deviate by 0.02 whatever its width."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=std)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


class TextTransformer(nn.Module):
    """The stack. Every call names the role; with `image` it is grounded, with role "decoder" it is causal."""

    def __init__(self, config: StackConfig, image_width: int):
        super().__init__()
        self.config = config
        self.embeddings = PerRole(config, "embeddings", lambda: Embeddings(config))
        self.layers = nn.ModuleList(
            TextLayer(config, image_width, attends=n >= config.fusion_layer) for n in range(config.depth)
        )
        self.head = LanguageHead(config) if "decoder" in config.roles else None
        self.apply(partial(initialise, std=config.init_std))
        if self.head is not None and self.head.weight is not None:
            nn.init.normal_(self.head.weight, std=0.02)

    def image_context(self, tokens_BND: Tensor, role: Role) -> ImageContext:
        """Project image tokens, once for all texts and steps that will attend to them; a pair for each layer."""
        if not torch.is_grad_enabled():
            tokens_BND = tokens_BND.to(product_format(tokens_BND))  # here and not in every layer
        attending = self.layers[self.config.fusion_layer :]
        return ImageContext.of_layers(layer.image_context(tokens_BND, role) for layer in attending)  # type: ignore[operator]

    def tokens_instead(self, tokens_BND: Tensor, role: Role, queries: int) -> ImageContext | None:
        """What takes the place of `image_context` for so many queries of an image in all; None: nothing does."""
        tokens_BND = tokens_BND.to(product_format(tokens_BND))  # one tensor for all layers
        attending: Any = self.layers[self.config.fusion_layer :]
        blocks = (layer.cross_attention.of(role).block for layer in attending)
        layers = [block.tokens_instead(tokens_BND, queries) for block in blocks]
        return None if None in layers else ImageContext.of_layers(layers)

    def key_projections(self, role: Role) -> list[nn.Module]:
        """The modules that `image_context` projects with, two of each layer."""
        attending = self.layers[self.config.fusion_layer :]
        return [module for layer in attending for module in layer.key_projections(role)]  # type: ignore[operator]

    def forward(
        self,
        ids_BT: Tensor,
        role: Role,
        mask_BT: Tensor | None = None,
        image: ImageContext | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Ids [B, T] -> states [B, T, D]; without an image those of the layers that read the text alone.

        `mask_BT` is 1 for text and 0 for padding. With `cache`, `ids_BT` are the newest positions only and all of
        the rows are as long as the cache says (generation starts from prompts of one length).
        """
        start = cache.start if cache is not None else 0
        x_BTD: Tensor = self.embeddings.of(role)(ids_BT, start)
        mask = self_attention_mask(x_BTD, mask_BT, causal=role == "decoder", start=start)
        x_BTD = self._run(x_BTD, self._attending(image), role, mask, image, cache)
        if cache is not None:
            cache.start += ids_BT.shape[1]
        return x_BTD

    def fuse_states(self, states_BTD: Tensor, mask_BT: Tensor, image: ImageContext) -> Tensor:
        """States of texts that were read alone -> the same beside images [B, T, D]: the upper layers of `forward`."""
        mask = self_attention_mask(states_BTD, mask_BT, causal=False)
        return self._run(states_BTD, self._attending(image)[self.config.fusion_layer :], "encoder", mask, image)

    def _run(
        self,
        x_BTD: Tensor,
        layers: Sequence[tuple[nn.Module, KeysValues | None]],
        role: Role,
        mask: Tensor | None,
        image: ImageContext | None,
        cache: Cache | None = None,
    ) -> Tensor:
        image_mask = None if image is None else image.mask
        for i, (layer, keys_values_of_image) in enumerate(layers):
            keys_values = layer.self_keys_values(x_BTD, role)  # type: ignore[operator]
            keys_values = cache.extend(i, keys_values) if cache is not None else keys_values
            x_BTD = layer(x_BTD, role, keys_values, mask, keys_values_of_image, image_mask)
        return x_BTD

    def cls_states(
        self,
        ids_BT: Tensor,
        lengths: Sequence[int],
        image: ImageContext | None = None,
        counts: Sequence[int] | None = None,
    ) -> Tensor:
        """Texts of unequal lengths -> the encoder's state of each one's first token [B, 1, D]: all that scoring needs.

        The same numbers as `forward` gives there, at the cost of the tokens that there are: padding passes through no
        linear layer, and the last layer computes the first tokens alone. `counts` says how many texts each image has,
        one after the other; every image has at least one.
        """
        texts = Packing(lengths, ids_BT.device)
        mask = texts.mask_BT[:, None, None, :]
        x_PD = texts.pack(self.embeddings.of("encoder")(ids_BT))
        layers, images = self._attending(image), _by_image(lengths, counts, ids_BT.device)
        assert image is None or image.mask is None, "whole images alone are scored"
        for i, (layer, seen) in enumerate(layers):
            keys_values = layer.self_keys_values(x_PD, "encoder", texts)  # type: ignore[operator]
            if i == len(layers) - 1:
                x_PD, one = x_PD[texts.cls_states], [1] * len(lengths)
                texts, images = Packing(one, ids_BT.device), _by_image(one, counts, ids_BT.device)
            x_PD = layer.packed(x_PD, keys_values, mask, texts, seen, images)  # type: ignore[operator]
        return x_PD[:, None]

    def _attending(self, image: ImageContext | None) -> list[tuple[nn.Module, KeysValues | None]]:
        """The layers to go through, each with what it attends to of the image."""
        below = self.config.fusion_layer
        alone = [(layer, None) for layer in (self.layers[:below] if below else self.layers)]
        if image is None:
            return [*alone]
        return [*alone[:below], *zip(self.layers[below:], image.layers, strict=True)]

    def output_layer(self) -> OutputLayer:
        """What turns a decoder state into logits."""
        assert self.head is not None, "a model without the decoder role cannot decode"
        words: Tensor = self.embeddings.of("decoder").words.weight  # type: ignore[assignment, union-attr]
        return OutputLayer(self.head, words if self.head.weight is None else self.head.weight)

    def logits(self, states_BTD: Tensor) -> Tensor:
        """Decoder states [B, T, D] -> next-token logits [B, T, V]."""
        return self.output_layer().logits(states_BTD)


def _by_image(lengths: Sequence[int], counts: Sequence[int] | None, device: torch.device) -> Packing:
    """Packed texts by image: the tokens of an image's texts are one sequence of queries."""
    if counts is None:
        return Packing(lengths, device)
    ends = list(itertools.accumulate(counts))
    assert ends[-1] == len(lengths), "every text belongs to an image"
    return Packing([sum(lengths[end - count : end]) for end, count in zip(ends, counts, strict=True)], device)


def self_attention_mask(x_BT: Tensor, mask_BT: Tensor | None, causal: bool, start: int = 0) -> Tensor | None:
    """Boolean mask, True = may be attended to, [B or 1, 1, T, start + T]; None where everything may be.

    `x_BT` are ids [B, T] or states [B, T, D].
    """
    T = x_BT.shape[1]
    mask = None if mask_BT is None else mask_BT.bool()[:, None, None, :]
    if causal and T > 1:
        triangle = torch.ones(T, start + T, dtype=torch.bool, device=x_BT.device).tril(start)[None, None]
        mask = triangle if mask is None else mask & triangle
    return mask
