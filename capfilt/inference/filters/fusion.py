"""A filter that reads each text beside its image: it gives itm = P(match), and itc where it can read a text alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from capfilt.inference.batches import Images
from capfilt.inference.filters.dual_encoder import DualEncoderFilter
from capfilt.inference.filters.fixed_shapes import in_parts_of, mask_of
from capfilt.inference.interface import Scores
from capfilt.inference.local_model import LocalModel
from capfilt.inference.roles import scores_given
from capfilt.models.layers.image_context import ImageContext
from capfilt.models.layers.transfer import to_device


class FusionFilter(DualEncoderFilter):
    """Scores texts of images by itm = P(match) after softmax in [0, 1], and by itc = cosine in [-1, 1] unless its model
    never reads a text without an image (ViLT)."""

    def __init__(self, local: LocalModel, max_length: int = 35):
        super().__init__(local, max_length)
        self.context_name: object = object()
        """Under which an image context of the encoder is kept in a batch of images, where another model makes it."""

    @property
    def given(self) -> tuple[str, ...]:
        return scores_given(self.model.capabilities)

    @torch.inference_mode()
    def score(self, images: Images, texts: Sequence[Sequence[str]]) -> Scores:
        tokens, context = self.local.image_tokens(images), images.computed(self.context_name)
        return self.score_tokens(tokens, texts, context, project=lambda: self.projection(images))

    def matches(
        self,
        tokens_BND: Tensor,
        texts: Sequence[Sequence[str]],
        numbers: Mapping[str, int],
        ids_TL: Tensor,
        lengths: list[int],
        context: ImageContext | None,
    ) -> Tensor:
        distinct = [list(dict.fromkeys(of_image)) for of_image in texts]
        with_text = [i for i, of_image in enumerate(distinct) if of_image]
        rows = [numbers[text] for of_image in distinct for text in of_image]
        image = self.model.image_context(tokens_BND, "encoder") if context is None else context
        if self.fixed_rows:
            of_pairs = [i for i, of_image in enumerate(distinct) for _ in of_image]
            return self._in_fixed_parts(ids_TL, lengths, image, torch.tensor([rows, of_pairs]))
        if len(with_text) < len(distinct):  # an image without texts has nothing to be read beside
            image = image.select(to_device(torch.tensor(with_text), image.device))
        counts = [len(distinct[i]) for i in with_text]
        ids = ids_TL[to_device(torch.tensor(rows), ids_TL.device)]
        states = self.model.fuse_cls(ids, [lengths[row] for row in rows], image, counts)
        return self.model.match(states).float().softmax(dim=1)[:, 1]

    def _in_fixed_parts(self, ids_TL: Tensor, lengths: list[int], image: ImageContext, pairs_2R: Tensor) -> Tensor:
        """P(match) [R] of pairs of a text and an image, by their numbers, with an image context for each text."""
        mask_TL, (text_R, image_R) = mask_of(ids_TL, lengths), to_device(pairs_2R, ids_TL.device)

        def of_pairs(rows: Tensor) -> Tensor:
            texts = text_R[rows]
            states = self.model.fuse(ids_TL[texts], mask_TL[texts], image.select(image_R[rows]))
            return self.model.match(states).float().softmax(dim=1)[:, 1]

        return in_parts_of(self.fixed_rows, len(text_R), ids_TL.device, of_pairs)

    @torch.inference_mode()
    def match_logits(self, tokens_BND: Tensor, texts: Sequence[str]) -> np.ndarray:
        """One text per image -> the logit of "matches" [B], BLIP's retrieval score without the cosine."""
        ids, lengths = self.token_ids([self.tokenizer.clean(text) for text in texts])
        image = self.model.image_context(tokens_BND, "encoder")
        states = self.model.fuse_cls(ids, lengths, image, [1] * len(lengths))
        logits: np.ndarray = self.model.match(states)[:, 1].float().cpu().numpy()
        return logits
