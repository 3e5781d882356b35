"""What gives the texts of images a score, and what it is given: some images of a shard with their rows.

A scorer that reads pictures is given a batch of images at a time; one that reads texts alone a whole shard at once, so
that it reads a text once however many images have it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from capfilt.data.annotations import Annotation
from capfilt.data.images.preprocess import ImageFormat
from capfilt.inference.batches import Images

Values = list[list[float | None]]
"""The score of each row of each image; None where it has none."""


@dataclass(frozen=True)
class ScoredImages:
    """Some images with the rows of their annotations, none of which failed."""

    rows: Sequence[Sequence[Annotation]]
    """Of each image, all of them, in the order of the table."""
    images: Images = field(default_factory=lambda: Images({}))
    """The pictures in the formats that the scorers read; none for those that read texts alone."""
    measured: Sequence[Mapping[str, float]] = ()
    """Of each image what its measures say, by name (`rules.MEASURES`)."""

    def part(self, rows: slice) -> ScoredImages:
        """Some of the images; nothing is computed of their pictures yet."""
        return ScoredImages(self.rows[rows], self.images.part(rows), self.measured[rows])


class Scorer(Protocol):
    """Gives every row of some images a score."""

    @property
    def image_formats(self) -> tuple[ImageFormat, ...]:
        """The pictures that it reads; none for one that reads texts or measures alone."""

    def score(self, batch: ScoredImages) -> Values:
        """The score of each row of each image."""
