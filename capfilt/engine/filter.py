"""The filter: the role that says how well texts match an image. Any model that can fuse may play it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from capfilt.data.tokens import Tokenizer, clean_caption
from capfilt.models.blip import Blip

NEEDS = frozenset({"encode_image", "encode_text", "fuse"})
"""The verbs of this role."""


class Filter:
    """Scores texts beside images: itm = P(match) after softmax in [0, 1], itc = cosine in [-1, 1]."""

    def __init__(self, model: Blip, tokenizer: Tokenizer, max_length: int = 35):
        self.model, self.tokenizer, self.max_length = model, tokenizer, max_length

    @torch.inference_mode()
    def score(self, tokens_BND: Tensor, texts: Sequence[Sequence[str]]) -> list[list[tuple[float, float]]]:
        """Image tokens and each image's texts -> (itm, itc) of each text."""
        most = max(map(len, texts))
        # Images with fewer texts are filled up, so that an image's keys can serve its texts without being copied.
        flat = [clean_caption(text) for own in texts for text in (*own, *[""] * (most - len(own)))]
        ids, mask = self._ids(flat, tokens_BND.device)
        image = self.model.image_keys(tokens_BND, "encoder")
        logits = self.model.match(self.model.fuse(ids, mask, image))
        itm = logits.float().softmax(dim=1)[:, 1].view(-1, most)
        text = self.model.project_text(self.model.encode_text(ids, mask)).float()
        picture = self.model.project_image(tokens_BND).float().repeat_interleave(most, dim=0)
        itc = (picture * text).sum(dim=1).clamp(-1, 1).view(-1, most)
        both = torch.stack([itm, itc], dim=-1).tolist()
        return [[(m, c) for m, c in row[: len(own)]] for row, own in zip(both, texts, strict=True)]

    @torch.inference_mode()
    def image_features(self, tokens_BND: Tensor) -> np.ndarray:
        """Image tokens -> unit vectors [B, projection]."""
        features: np.ndarray = self.model.project_image(tokens_BND).float().cpu().numpy()
        return features

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> unit vectors [B, projection]."""
        ids, mask = self._ids([clean_caption(text) for text in texts], self._device)
        features: np.ndarray = self.model.project_text(self.model.encode_text(ids, mask)).float().cpu().numpy()
        return features

    @torch.inference_mode()
    def match_logits(self, tokens_BND: Tensor, texts: Sequence[str]) -> np.ndarray:
        """One text per image -> the logit of "matches" [B], BLIP's retrieval score without the cosine."""
        ids, mask = self._ids([clean_caption(text) for text in texts], tokens_BND.device)
        states = self.model.fuse(ids, mask, self.model.image_keys(tokens_BND, "encoder"))
        logits: np.ndarray = self.model.match(states)[:, 1].float().cpu().numpy()
        return logits

    @property
    def _device(self) -> torch.device:
        return self.model.temperature.device

    def _ids(self, texts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        ids, mask = self.tokenizer.encode(texts, self.max_length)
        return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
