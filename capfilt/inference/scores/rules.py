"""Scores of the picture itself, without a model: its shorter side, its aspect and its entropy.

They are of the decoded, upright picture, and the same for all texts of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image

from capfilt.data.images.preprocess import ImageFormat
from capfilt.inference.scores.interface import ScoredImages, Values


def side(picture: Image.Image) -> float:
    """The shorter side in pixels."""
    return float(min(picture.size))


def aspect(picture: Image.Image) -> float:
    """The longer side divided by the shorter one, at least 1."""
    return max(picture.size) / min(picture.size)


def entropy(picture: Image.Image) -> float:
    """Shannon's entropy in bits, 0 to 8, of the histogram of the grey picture in 256 bins; a plain area has 0."""
    shares = np.array(picture.convert("L").histogram()) / (picture.width * picture.height)
    shares = shares[shares > 0]
    return float(np.clip(-(shares * np.log2(shares)).sum(), 0, 8))


MEASURES: Mapping[str, Callable[[Image.Image], float]] = {"side": side, "aspect": aspect, "entropy": entropy}


class RuleScorer:
    """Gives all texts of an image what a measure says of its picture."""

    image_formats: tuple[ImageFormat, ...] = ()

    def __init__(self, name: str):
        self.name = name

    def score(self, batch: ScoredImages) -> Values:
        """The measure of each image, once for each of its rows."""
        return [[measured[self.name]] * len(rows) for rows, measured in zip(batch.rows, batch.measured, strict=True)]
