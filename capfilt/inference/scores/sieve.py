"""SIEVE (Mahmoud et al. 2023, arXiv 2310.02110): does a text say what the captions of its image say?

The score of a text is the greatest cosine, by a sentence encoder, between it and the synthetic captions of its own
image, all of them without the words that name the medium ("a photo of"), which would make any two texts alike. A
synthetic text is compared with the image's other synthetic texts. No picture is read: the captions stand for it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from capfilt.data.annotations import Annotation
from capfilt.data.images.preprocess import ImageFormat
from capfilt.data.sample import is_text
from capfilt.inference.scores.interface import ScoredImages, Values

VERSION = 1
"""Raised when the phrases change: scores of other phrases are other scores."""

_MEDIA = "photo|photograph|picture|image|illustration|drawing|icon|template|thumbnail|vector"
_MEDIUM = re.compile(
    rf"\b(?:(?:an?|the)\s+)?(?:stock\s+)?(?:{_MEDIA})s?(?:\s+stock)?\b(?:\s+(?:of|showing)\b)?", re.IGNORECASE
)


def without_medium(text: str) -> str:
    """A text without the words that name the medium; the public code cuts parts of words too ("photographer")."""
    return " ".join(_MEDIUM.sub(" ", text).split())


class Encoder(Protocol):
    """Texts to unit vectors."""

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> unit vectors, float32 [T, D]."""


class SieveScorer:
    """Scores texts by the captions of their image; None where either says nothing but the medium."""

    image_formats: tuple[ImageFormat, ...] = ()

    def __init__(self, encoder: Encoder):
        self.encoder = encoder

    def score(self, batch: ScoredImages) -> Values:
        """The greatest cosine of each text and the synthetic texts of its image, without itself."""
        cleaned = [[without_medium(row.text) for row in rows] for rows in batch.rows]
        distinct = dict.fromkeys(text for of_image in cleaned for text in of_image if is_text(text))
        numbers = {text: number for number, text in enumerate(distinct)}
        vectors_TD = self.encoder.encode(list(numbers)) if numbers else np.empty((0, 0))
        return [
            _of_image(rows, [numbers.get(text, -1) for text in of_image], vectors_TD)
            for rows, of_image in zip(batch.rows, cleaned, strict=True)
        ]


def _of_image(rows: Sequence[Annotation], numbers: Sequence[int], vectors_TD: np.ndarray) -> list[float | None]:
    """The score of each text of one image; `numbers` are the rows of `vectors_TD` for its texts, -1 for no text."""
    best: list[float | None] = [None] * len(rows)
    captions = [i for i, row in enumerate(rows) if row.source == "synthetic" and numbers[i] >= 0]
    for i, number in enumerate(numbers):
        others = [numbers[caption] for caption in captions if caption != i]  # a caption does not vouch for itself
        if number >= 0 and others:
            best[i] = float(np.clip((vectors_TD[others] @ vectors_TD[number]).max(), -1, 1))
    return best
