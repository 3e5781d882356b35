"""VLMo (arXiv 2111.02358): one stack of blocks that reads texts, images, or both, by experts for each.

Image tokens are embedded patches alone: comparing an image and reading a text beside it are passes of their own over
them. A text need not be padded to `max_positions`: experts are told apart at its last column, and padding is not seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capfilt.models.checkpoints.files import Tensors
from capfilt.models.interface import Model
from capfilt.models.layers.attention import stochastic_depth
from capfilt.models.layers.bert import Embeddings, LanguageHead
from capfilt.models.layers.block import Block, recomputed
from capfilt.models.layers.config import Role
from capfilt.models.layers.image_context import ImageContext, cls_of_pairs
from capfilt.models.layers.precision import unit
from capfilt.models.layers.transfer import mask_of
from capfilt.models.layers.vit import resize_positions
from capfilt.models.vlmo.blocks import CROSS, Modality, MultiwayBlock, RelativePositions, resize_relative
from capfilt.models.vlmo.config import VlmoConfig

MULTIWAY_BLOCK = Block(MultiwayBlock, repeated=True)


class Vlmo(Model):
    """The blocks with embeddings and heads."""

    config: VlmoConfig
    entry_points = (*Model.entry_points, "text_vectors", "image_vectors", "guess_words", "unmask")

    def __init__(self, config: VlmoConfig):
        super().__init__()
        self.config = config
        width = config.vision.width
        self.patches = nn.Conv2d(3, width, config.vision.patch_size, stride=config.vision.patch_size)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        absolute = not config.vision.relative_positions
        self.positions = nn.Parameter(torch.zeros(1, config.vision.num_tokens, width)) if absolute else None
        self.relative = None if absolute else RelativePositions(config.vision, config.text.longest)
        self.text = Embeddings(config.text)
        self.modality = nn.Embedding(1 + config.images, width)
        """Added to texts and to images, each picture beside a text its own."""
        self.blocks = nn.ModuleList(
            MultiwayBlock(config.vision, fused=i >= config.vision.depth - config.vision.fused)
            for i in range(config.vision.depth)
        )
        self.rates = [config.vision.drop_path * i / max(config.vision.depth - 1, 1) for i in range(config.vision.depth)]
        self.norm = nn.LayerNorm(width, eps=config.vision.layer_norm_eps)
        self.pooler = nn.Linear(width, width)
        self.mlm_head = LanguageHead(config.text) if "mlm" in config.outputs else None
        self.match_head = nn.Linear(width, 2) if "itm" in config.outputs else None
        if "itc" in config.outputs:
            self.image_projection = nn.Linear(width, width, bias=False)
            self.text_projection = nn.Linear(width, width, bias=False)
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / config.temperature)))
        if "itc_fused" in config.outputs:
            self.fused_image_projection = nn.Linear(width, width, bias=False)
            self.fused_text_projection = nn.Linear(width, width, bias=False)
            self.fused_logit_scale = nn.Parameter(torch.tensor(math.log(1 / config.temperature)))
        self.recompute = 0
        self._initialise()

    def _initialise(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                draw = nn.init.trunc_normal_ if name.startswith("blocks.") else nn.init.normal_
                draw(module.weight, std=self.config.vision.init_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for tensor in (self.cls, self.positions):
            if tensor is not None:
                nn.init.trunc_normal_(tensor, std=0.02)
        if self.mlm_head is not None and self.mlm_head.weight is not None:
            nn.init.normal_(self.mlm_head.weight, std=self.config.text.init_std)

    def recompute_vision(self, blocks: int) -> None:
        self.recompute = blocks

    def adapt(self, tensors: Tensors) -> None:
        """Bring a saved model's positions to this one's picture size and to the first of its texts, in place."""
        config, table, absolute = self.config, tensors.get("relative.table"), tensors.get("positions")
        if table is not None:
            tensors["relative.table"] = resize_relative(table, config.vision.side, CROSS + 2 * config.text.longest)
        if absolute is not None:
            tensors["positions"] = resize_positions(absolute, config.vision.image_size, config.vision.patch_size)
        if (positions := tensors.get("text.positions.weight")) is not None:
            tensors["text.positions.weight"] = positions[: config.text.max_positions]

    def run(
        self, x_BND: Tensor, modality: Modality, texts: int, mask_BN: Tensor | None = None, tail: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Embedded rows, the first `texts` of a text -> states [B, N, D].

        With `tail`, also those of a pass whose last blocks read by the fused experts, though it is of one modality.
        """
        biases: Sequence[Tensor | None] = [None] * len(self.blocks)
        if self.relative is not None:
            biases = self.relative(texts, texts < x_BND.shape[1])
        first_fused = len(self.blocks) - self.config.vision.fused
        fused_BND = x_BND
        for i in range(len(self.blocks)):
            fused_BND = x_BND if i == first_fused else fused_BND
            x_BND = self._block(i, x_BND, modality, texts, biases[i], mask_BN)
        if not tail:
            return self.norm(x_BND), None
        for i in range(first_fused, len(self.blocks)):
            fused_BND = self._block(i, fused_BND, "fused", texts, biases[i], mask_BN)
        return self.norm(x_BND), self.norm(fused_BND)

    def _block(
        self, i: int, x_BND: Tensor, modality: Modality, texts: int, bias_HNN: Tensor | None, mask_BN: Tensor | None
    ) -> Tensor:
        block, rate = self.blocks[i], self.rates[i] if self.training else 0.0
        drawn = [stochastic_depth(x_BND, rate) for _ in range(2)]
        depth = torch.cat([part for part in drawn if part is not None])[:3] if rate else None
        given = (x_BND, modality, texts, bias_HNN, mask_BN, depth)
        return recomputed(i >= len(self.blocks) - self.recompute, block, *given)

    # ---- images, texts, and both ----

    def encode_image(self, images_B3SS: Tensor, number: int = 1) -> Tensor:
        """Pictures [B, 3, S, S] -> embedded patches [B, N, D], [CLS] first; no block has read them. `number`: which of
        the pictures beside one text these are, from 1."""
        x_BND = self.patches(images_B3SS).flatten(2).transpose(1, 2)
        x_BND = torch.cat([self.cls.expand(len(x_BND), -1, -1), x_BND], dim=1)
        x_BND = x_BND if self.positions is None else x_BND + self.positions
        return x_BND + self.modality.weight[number]

    def embed_text(self, ids_BT: Tensor) -> Tensor:
        """Ids -> embedded words [B, T, D]; no block has read them."""
        return self.text(ids_BT, absolute=self.relative is None) + self.modality.weight[0]

    def encode_text(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        return self.run(self.embed_text(ids_BT), "text", ids_BT.shape[1], mask_BT.bool())[0]

    def encode_cls(self, ids_BT: Tensor, lengths: Sequence[int]) -> Tensor:
        return self.encode_text(ids_BT, mask_of(lengths, ids_BT))[:, :1]

    def image_vectors(self, tokens_BND: Tensor, tail: bool = False) -> list[Tensor]:
        """Image tokens -> unit vectors [B, D], and with `tail` those behind the fused experts."""
        states, fused = self.run(tokens_BND, "image", 0, tail=tail)
        vectors = [unit(self.image_projection(states[:, 0]))]
        return vectors if fused is None else [*vectors, unit(self.fused_image_projection(fused[:, 0]))]

    def text_vectors(self, ids_BT: Tensor, mask_BT: Tensor, tail: bool = False) -> list[Tensor]:
        """Texts -> unit vectors [B, D], and with `tail` those behind the fused experts."""
        states, fused = self.run(self.embed_text(ids_BT), "text", ids_BT.shape[1], mask_BT.bool(), tail)
        vectors = [self.project_text(states)]
        return vectors if fused is None else [*vectors, unit(self.fused_text_projection(fused[:, 0]))]

    def project_image(self, tokens_BND: Tensor) -> Tensor:
        return self.image_vectors(tokens_BND)[0]

    def project_text(self, states_BTD: Tensor) -> Tensor:
        return unit(self.text_projection(states_BTD[:, 0]))

    def image_context(self, tokens_BND: Tensor, role: Role, prompt: Sequence[int] = ()) -> ImageContext:
        """Image tokens -> these: a text and its image are read together from the first block on."""
        return ImageContext((tokens_BND,))

    def fuse(self, ids_BT: Tensor, mask_BT: Tensor, image: ImageContext) -> Tensor:
        """Texts beside images -> states of words and image tokens [B, T + N, D]; rows that share an image are
        adjacent."""
        (tokens_BND,) = image.repeat_interleave(len(ids_BT) // image.rows).tensors
        text_BTD = self.embed_text(ids_BT)
        mask = F.pad(mask_BT.bool(), (0, tokens_BND.shape[1]), value=True)
        x_BND = torch.cat([text_BTD, tokens_BND.to(text_BTD.dtype)], dim=1)
        return self.run(x_BND, "fused", ids_BT.shape[1], mask)[0]

    def fuse_cls(self, ids_BT: Tensor, lengths: Sequence[int], image: ImageContext, counts: Sequence[int]) -> Tensor:
        return cls_of_pairs(self.fuse, ids_BT, lengths, image, counts)

    def summary(self, states_BTD: Tensor) -> Tensor:
        """Fused states -> one vector [B, D], from the first word's."""
        return torch.tanh(self.pooler(states_BTD[:, 0]))

    def match(self, states_BTD: Tensor) -> Tensor:
        assert self.match_head is not None, "a model without a head that matches"
        return self.match_head(self.summary(states_BTD))

    def guess_words(self, states_BTD: Tensor) -> Tensor:
        """States of words -> logits of the words that stood there [B, T, V]."""
        assert self.mlm_head is not None, "a model without a head that guesses words"
        return self.mlm_head(states_BTD, self.text.words.weight)

    def unmask(self, ids_BT: Tensor, mask_BT: Tensor, image: ImageContext) -> Tensor:
        return self.guess_words(self.fuse(ids_BT, mask_BT, image)[:, : ids_BT.shape[1]])
