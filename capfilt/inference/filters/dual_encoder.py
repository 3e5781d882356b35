"""A filter that encodes images and texts apart and compares them: it gives itc, the cosine, and no itm.

`FusionFilter` is the other: it gives itm too, or alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from capfilt.data.images.preprocess import ImageFormat
from capfilt.data.text.tokenizer import MAX_CHARACTERS
from capfilt.inference.batches import Images
from capfilt.inference.filters.fixed_shapes import in_parts_of, mask_of
from capfilt.inference.interface import Scores
from capfilt.inference.local_model import LocalModel
from capfilt.models.layers.image_context import ImageContext
from capfilt.models.layers.transfer import to_device

MAX_TEXTS = 2048
"""Texts that are read at a time, or those of one image."""


class DualEncoderFilter:
    """Scores texts of images by itc = cosine in [-1, 1]."""

    def __init__(self, local: LocalModel, max_length: int = 35):
        self.local, self.model, self.tokenizer = local, local.model, local.tokenizer
        self.max_length = max_length
        self.fixed_rows = 0
        """How many texts are read at a time, all of `max_length` tokens, so that none depends on which others there are
        (`deterministic`); 0: as many as there are, without padding."""

    @property
    def given(self) -> tuple[str, ...]:
        """The scores that it gives."""
        return ("itc",)

    @property
    def image_formats(self) -> tuple[ImageFormat, ...]:
        return (self.local.image_format,)

    @torch.inference_mode()
    def prepare(self, images: Images) -> None:
        self.local.image_tokens(images)

    @torch.inference_mode()
    def score(self, images: Images, texts: Sequence[Sequence[str]]) -> Scores:
        return self.score_tokens(self.local.image_tokens(images), texts, project=lambda: self.projection(images))

    @torch.inference_mode()
    def projection(self, images: Images) -> Tensor:
        """What texts are compared with of images, [B, P] or [B, Q, P]; computed once for each batch."""
        return images.once(self, lambda: self.model.project_image(self.local.image_tokens(images)))

    @torch.inference_mode()
    def score_tokens(
        self,
        tokens_BND: Tensor,
        texts: Sequence[Sequence[str]],
        context: ImageContext | None = None,
        project: Callable[[], Tensor] | None = None,
    ) -> Scores:
        """`score` from image tokens; `context` is what texts attend to of the images, where that is known already, and
        `project` gives their projection.

        A text is read once with each image that has it, however often it has it, and once in the whole batch without
        an image.
        """
        half = len(texts) // 2
        if half and sum(map(len, texts)) > MAX_TEXTS and not self.fixed_rows:
            parts = [
                self.score_tokens(tokens_BND[part], texts[part], None if context is None else context.select(part))
                for part in (slice(half), slice(half, None))
            ]
            return {name: _joined(scores[name] for scores in parts) for name in parts[0]}
        cleaned = [[self.tokenizer.clean(text) for text in of_image] for of_image in texts]
        numbers = {text: i for i, text in enumerate(dict.fromkeys(text for of_image in cleaned for text in of_image))}
        if not numbers:
            return {name: [[] for _ in texts] if name in self.given else None for name in ("itm", "itc")}
        ids, lengths = self.token_ids(list(numbers))
        cosines = None
        if "itc" in self.given:
            projected = self.model.project_image(tokens_BND) if project is None else project()
            cosines = self.cosines(projected, ids, lengths)
        itm, itc = _read(self.matches(tokens_BND, cleaned, numbers, ids, lengths, context), cosines)
        if itm is not None:
            values = iter(itm)
            by_text = [{text: next(values) for text in dict.fromkeys(of_image)} for of_image in cleaned]
            itm = [[known[text] for text in of_image] for of_image, known in zip(cleaned, by_text, strict=True)]
        if itc is not None:
            itc = [[row[numbers[text]] for text in of_image] for of_image, row in zip(cleaned, itc, strict=True)]
        return {"itm": itm, "itc": itc}

    def matches(
        self,
        tokens_BND: Tensor,
        texts: Sequence[Sequence[str]],
        numbers: Mapping[str, int],
        ids_TL: Tensor,
        lengths: list[int],
        context: ImageContext | None,
    ) -> Tensor | None:
        """P(match) of each image's distinct texts in their order, [R], whose ids are `ids_TL[numbers[text]]`; None of a
        filter that gives none."""
        return None

    def cosines(self, projected: Tensor, ids_TL: Tensor, lengths: list[int]) -> Tensor:
        """The cosine of every image and every text, [B, T]."""
        if self.fixed_rows:
            mask_TL, image = mask_of(ids_TL, lengths), projected.float()

            def of_texts(rows: Tensor) -> Tensor:
                text = self.model.project_text(self.model.encode_text(ids_TL[rows], mask_TL[rows]))
                return self.model.similarity(image, text.float()).clamp(-1, 1).T

            return in_parts_of(self.fixed_rows, len(ids_TL), ids_TL.device, of_texts).T
        text = self.model.project_text(self.model.encode_cls(ids_TL, lengths)).float()
        return self.model.similarity(projected.float(), text).clamp(-1, 1)

    def reads_all(self, text: str) -> bool:
        words = self.tokenizer.clean(text, max_words=MAX_CHARACTERS)
        if len(text) > MAX_CHARACTERS or words != self.tokenizer.clean(text):
            return False
        ids, _ = self.tokenizer.encode([words], self.max_length + 1)
        return len(ids[0]) <= self.max_length

    @torch.inference_mode()
    def image_features(self, tokens_BND: Tensor) -> np.ndarray:
        """Image tokens -> unit vectors [B, projection], or several of each image [B, Q, projection] (BLIP-2)."""
        features: np.ndarray = self.model.project_image(tokens_BND).float().cpu().numpy()
        return features

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> unit vectors [B, projection]."""
        ids, lengths = self.token_ids([self.tokenizer.clean(text) for text in texts])
        features: np.ndarray = self.model.project_text(self.model.encode_cls(ids, lengths)).float().cpu().numpy()
        return features

    @torch.inference_mode()
    def similarities(self, image: np.ndarray, text: np.ndarray) -> np.ndarray:
        """Features of images and of texts -> cosines [images, texts], in fp32 whatever the model computes in."""
        with torch.autocast("cpu", enabled=False):
            cosines: np.ndarray = self.model.similarity(torch.from_numpy(image), torch.from_numpy(text)).numpy()
        return cosines

    def token_ids(self, texts: Sequence[str]) -> tuple[Tensor, list[int]]:
        """Padded ids [T, L] of texts that are cleaned, and the length of each."""
        ids, mask = self.tokenizer.encode(texts, self.max_length)
        if self.fixed_rows:
            ids = np.pad(ids, ((0, 0), (0, self.max_length - ids.shape[1])), constant_values=self.tokenizer.pad)
        return to_device(torch.from_numpy(ids), self.local.device), mask.sum(axis=1).tolist()


def _read(*scores: Tensor | None) -> list[Any]:
    """Tensors as lists, which the host waits for once; None for None."""
    there = [each for each in scores if each is not None]
    parts = torch.cat([each.flatten() for each in there]).cpu().split([each.numel() for each in there])
    lists = (part.view(each.shape).tolist() for part, each in zip(parts, there, strict=True))
    return [None if each is None else next(lists) for each in scores]


def _joined(parts: Iterable[list[list[float]] | None]) -> list[list[float]] | None:
    """The values of one score from parts of a batch; None where it is not given."""
    values = [of_image for part in parts if part is not None for of_image in part]
    return values or None
