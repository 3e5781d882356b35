"""The cosine of image and text by any model that encodes both apart: CLIP and its kin, or the itc of another filter."""

from __future__ import annotations

from capfilt.data.images.preprocess import ImageFormat
from capfilt.inference.annotator import score_texts
from capfilt.inference.filters.dual_encoder import DualEncoderFilter
from capfilt.inference.local_model import LocalModel
from capfilt.inference.scores.interface import ScoredImages, Values


class ClipScorer:
    """Scores texts by the cosine, in [-1, 1], with as many tokens as the model's family evaluates with (CLIP: 77)."""

    def __init__(self, local: LocalModel):
        self.filter = DualEncoderFilter(local, local.model.config.scored_length)

    @property
    def image_formats(self) -> tuple[ImageFormat, ...]:
        return self.filter.image_formats

    def score(self, batch: ScoredImages) -> Values:
        """The cosine of each text and its image; None for what is no text."""
        texts = [[row.text for row in rows] for rows in batch.rows]
        pairs = score_texts(lambda real: self.filter.score(batch.images, real), texts)
        return [[cosine for _, cosine in of_image] for of_image in pairs]
