"""ViLT (arXiv 2102.03334): one transformer over the words of a text and the patches of a picture, and no towers.

A picture keeps its shape: it comes with a fourth channel that says where it is, and has as many patches as fit. Image
tokens are embedded patches, each with one number more: 1, and 0 where a batch of unequal pictures is padded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from capfilt.errors import ModelError
from capfilt.models.interface import Model
from capfilt.models.layers.bert import Embeddings, LanguageHead
from capfilt.models.layers.config import Role
from capfilt.models.layers.image_context import ImageContext, cls_of_pairs
from capfilt.models.layers.vit import VisionTransformer, positions_of_shapes
from capfilt.models.vilt.config import ViltConfig


class Vilt(Model):
    """The blocks with embeddings and heads. N counts image tokens, I_CLS included; H and W patches."""

    config: ViltConfig
    entry_points = (*Model.entry_points, "guess_words", "task_logits")

    def __init__(self, config: ViltConfig):
        super().__init__()
        self.config = config
        width, heads = config.vision.width, config.heads
        self.text = Embeddings(config.text)
        self.vision = VisionTransformer(config.vision, config.vision.dropout)
        self.embedded = nn.Dropout(config.vision.dropout)
        self.modality = nn.Embedding(1 + config.images, width)
        """Of texts, and of each picture beside one."""
        self.pooler = nn.Linear(width, width) if config.pooled else None
        self.mlm_head = LanguageHead(config.text) if "mlm" in heads else None
        self.match_head = nn.Linear(width, 2) if "itm" in heads else None
        self.rank_head = nn.Linear(width, 1) if "rank" in heads else None
        self.classifier = classifier(config)
        for module in (self.text, self.modality, self.pooler, self.match_head, self.rank_head, self.classifier):
            if module is not None:
                module.apply(self._initialise)
        if self.mlm_head is not None:
            self._initialise(self.mlm_head.transform)
            if self.mlm_head.weight is not None:
                nn.init.normal_(self.mlm_head.weight, std=config.text.init_std)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.text.init_std)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def recompute_vision(self, blocks: int) -> None:
        self.vision.recompute = blocks

    def patches_there(self, images_BCHW: Tensor) -> Tensor:
        """Pictures -> True for the patches in which there is one, [B, H, W]: read at their upper left corners.

        Raises:
            ModelError: sides that patches do not divide.
        """
        patch, (height, width) = self.config.patch_size, images_BCHW.shape[2:]
        if height % patch or width % patch:
            raise ModelError(
                f"pictures of {width} x {height} px, which patches of {patch} do not divide; resize each side to a "
                f"multiple of {patch}"
            )
        if images_BCHW.shape[1] == 4:
            return images_BCHW[:, 3, ::patch, ::patch] > 0.5
        shape = (images_BCHW.shape[0], height // patch, width // patch)
        return torch.ones(shape, dtype=torch.bool, device=images_BCHW.device)

    def encode_image(self, images_BCHW: Tensor, chosen_BK: Tensor | None = None, number: int = 1) -> Tensor:
        """Pictures [B, 4, H, W], or [B, 3, H, W] of one shape -> image tokens [B, N, D + 1], I_CLS first.

        Args:
            chosen_BK: the patches to keep, by their numbers row by row; None: all.
            number: which of the pictures beside one text these are, from 1.
        """
        there_BN = self.patches_there(images_BCHW)
        positions_BND = positions_of_shapes(self.vision.positions, there_BN).flatten(1, 2)
        there_BN = there_BN.flatten(1)
        patches_BND = self.vision.patches(images_BCHW[:, :3]).flatten(2).transpose(1, 2) + positions_BND
        if chosen_BK is not None:
            there_BN = there_BN.gather(1, chosen_BK)
            patches_BND = patches_BND.gather(1, chosen_BK[:, :, None].expand(-1, -1, patches_BND.shape[2]))
        cls_BND = (self.vision.cls + self.vision.positions[:, :1]).expand(len(patches_BND), -1, -1)
        tokens_BND = self.embedded(torch.cat([cls_BND, patches_BND], dim=1)) + self.modality.weight[number]
        there_BN1 = torch.cat([torch.ones_like(there_BN[:, :1]), there_BN], dim=1)[:, :, None]
        return torch.cat([tokens_BND, there_BN1.to(tokens_BND.dtype)], dim=2)

    def image_context(self, tokens_BND: Tensor, role: Role, prompt: Sequence[int] = ()) -> ImageContext:
        """Image tokens -> these, and where there are any."""
        return ImageContext((tokens_BND[:, :, :-1], tokens_BND[:, :, -1] > 0.5))

    def fuse(self, ids_BT: Tensor, mask_BT: Tensor, image: ImageContext) -> Tensor:
        """Texts beside images -> states of words and image tokens [B, T + N, D]; rows that share an image are
        adjacent."""
        times = len(ids_BT) // image.rows
        tokens_BND, there_BN = (image if times == 1 else image.repeat_interleave(times)).tensors
        text_BTD = self.text(ids_BT) + self.modality.weight[0]
        mask = torch.cat([mask_BT.bool(), there_BN], dim=1)[:, None, None, :]
        return self.vision.run(torch.cat([text_BTD, tokens_BND.to(text_BTD.dtype)], dim=1), mask)

    def fuse_cls(self, ids_BT: Tensor, lengths: Sequence[int], image: ImageContext, counts: Sequence[int]) -> Tensor:
        return cls_of_pairs(self.fuse, ids_BT, lengths, image, counts)

    def summary(self, states_BND: Tensor) -> Tensor:
        """Fused states -> one vector [B, D], from the first word's."""
        assert self.pooler is not None, "a classifier of tokens pools nothing"
        return torch.tanh(self.pooler(states_BND[:, 0]))

    def match(self, states_BTD: Tensor) -> Tensor:
        """Fused states -> ITM logits [B, 2]; column 1 is "matches". Of a head that ranks: its number beside a 0, so
        that P(match) is its sigmoid."""
        pooled_BD = self.summary(states_BTD)
        if self.rank_head is not None:
            rank_B1: Tensor = self.rank_head(pooled_BD)
            return torch.cat([torch.zeros_like(rank_B1), rank_B1], dim=1)
        assert self.match_head is not None, "a model without a head that matches"
        return self.match_head(pooled_BD)

    def guess_words(self, states_BTD: Tensor) -> Tensor:
        """States of words -> logits of the words that stood there [B, T, V]."""
        assert self.mlm_head is not None, "a model without a head that guesses words"
        return self.mlm_head(states_BTD, self.text.words.weight)

    def classify(self, tokens_BND: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Texts beside the image tokens of their pictures, of two pictures [2 B, N, D + 1] with the left ones first ->
        logits of the classes [B, labels]."""
        sides = []
        for number, side in enumerate(tokens_BND.chunk(self.config.pictures_of_text)):
            tokens, there = self.image_context(side, "encoder").tensors
            other = self.modality.weight[1 + number] - self.modality.weight[1]
            sides.append(self.fuse(ids_BT, mask_BT, ImageContext((tokens + other, there))))
        return self.task_logits(sides)

    def task_logits(self, states: Sequence[Tensor]) -> Tensor:
        """Fused states of one text beside each of its pictures -> logits of the classes: [B, labels], of tokens
        [B, T + N, labels]."""
        assert self.classifier is not None, "a model without a classifier"
        inputs = torch.cat([self.summary(each) for each in states], dim=1) if self.config.pooled else states[0]
        return self.classifier(inputs)


def classifier(config: ViltConfig) -> nn.Module | None:
    """The head of VQA, NLVR2 or tokens; None where there is none of them."""
    width = config.vision.width
    if "tokens" in config.heads:
        return nn.Linear(width, config.labels)
    if not config.labels:
        return None
    inputs = width * (config.images if "nlvr2" in config.heads else 1)
    hidden = inputs if "nlvr2" in config.heads else 2 * inputs
    return nn.Sequential(nn.Linear(inputs, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, config.labels))
