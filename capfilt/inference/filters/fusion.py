"""The filter: the role that says how well texts match an image. Any model that can fuse may play it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from capfilt.data.text.tokenizer import MAX_CHARACTERS, Tokenizer
from capfilt.models import Model
from capfilt.models.layers.image_context import ImageContext

NEEDS = frozenset({"encode_image", "encode_text", "fuse"})
"""The verbs of this role."""


MOST = 2048
"""Texts that are read at a time, or those of one image."""


class Filter:
    """Scores texts beside images: itm = P(match) after softmax in [0, 1], itc = cosine in [-1, 1]."""

    def __init__(self, model: Model, tokenizer: Tokenizer, max_length: int = 35):
        self.model, self.tokenizer, self.max_length = model, tokenizer, max_length

    @torch.inference_mode()
    def score(
        self, tokens_BND: Tensor, texts: Sequence[Sequence[str]], keys: ImageContext | None = None
    ) -> list[list[tuple[float, float]]]:
        """Image tokens and each image's texts -> (itm, itc) of each text.

        A text is read once beside each image that has it, however often it has it, and once in the whole batch
        without an image. `keys` are the image's for the encoder, where somebody has projected them already.
        """
        half = len(texts) // 2
        if half and sum(map(len, texts)) > MOST:
            first, second = (
                self.score(tokens_BND[part], texts[part], None if keys is None else keys.select(part))
                for part in (slice(half), slice(half, None))
            )
            return first + second
        cleaned = [[self.tokenizer.clean(text) for text in own] for own in texts]
        pairs = [list(dict.fromkeys(own)) for own in cleaned]
        words = {text: i for i, text in enumerate(dict.fromkeys(text for own in pairs for text in own))}
        if not words:
            return [[] for _ in texts]
        ids, lengths = self._ids(list(words), tokens_BND.device)
        itc = self._cosines(tokens_BND, ids, lengths)
        seen = [i for i, own in enumerate(pairs) if own]  # an image without texts has nothing to be read beside
        rows = [words[text] for own in pairs for text in own]
        image = self.model.image_context(tokens_BND, "encoder") if keys is None else keys
        if len(seen) < len(pairs):
            image = image.select(torch.tensor(seen, device=image.device))
        counts = [len(pairs[i]) for i in seen]
        states = self.model.fuse_cls(ids[rows], [lengths[row] for row in rows], image, counts)
        itm = iter(self.model.match(states).float().softmax(dim=1)[:, 1].tolist())
        scores = [
            {text: (next(itm), cosines[words[text]]) for text in own} for own, cosines in zip(pairs, itc, strict=True)
        ]
        return [[known[text] for text in own] for own, known in zip(cleaned, scores, strict=True)]

    def _cosines(self, tokens_BND: Tensor, ids: Tensor, lengths: Sequence[int]) -> list[list[float]]:
        """The cosine of every image and every text."""
        text = self.model.project_text(self.model.encode_cls(ids, lengths)).float()
        image = self.model.project_image(tokens_BND).float()
        cosines: list[list[float]] = self.model.similarity(image, text).clamp(-1, 1).tolist()
        return cosines

    def reads_all(self, text: str) -> bool:
        """Whether a text is judged by all of it, not by its first words or tokens only."""
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
        ids, lengths = self._ids([self.tokenizer.clean(text) for text in texts], self._device)
        features: np.ndarray = self.model.project_text(self.model.encode_cls(ids, lengths)).float().cpu().numpy()
        return features

    @torch.inference_mode()
    def similarities(self, image: np.ndarray, text: np.ndarray) -> np.ndarray:
        """Features of images and of texts -> cosines [images, texts]."""
        cosines: np.ndarray = self.model.similarity(torch.from_numpy(image), torch.from_numpy(text)).numpy()
        return cosines

    @torch.inference_mode()
    def match_logits(self, tokens_BND: Tensor, texts: Sequence[str]) -> np.ndarray:
        """One text per image -> the logit of "matches" [B], BLIP's retrieval score without the cosine."""
        ids, lengths = self._ids([self.tokenizer.clean(text) for text in texts], tokens_BND.device)
        image = self.model.image_context(tokens_BND, "encoder")
        states = self.model.fuse_cls(ids, lengths, image, [1] * len(lengths))
        logits: np.ndarray = self.model.match(states)[:, 1].float().cpu().numpy()
        return logits

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _ids(self, texts: Sequence[str], device: torch.device) -> tuple[Tensor, list[int]]:
        """Padded ids [B, T] and the length of each text."""
        ids, mask = self.tokenizer.encode(texts, self.max_length)
        return torch.from_numpy(ids).to(device), mask.sum(axis=1).tolist()
