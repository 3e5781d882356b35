"""The two roles: a captioner writes texts for images, a filter says how well texts match them.

Both begin at decoded pictures. Each says which pictures it reads (`image_formats`); captioner and filter may differ in
size, resize rule, normalisation and tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol, runtime_checkable

from PIL import Image

from capfilt.data.images.preprocess import ImageFormat
from capfilt.data.sample import Sample
from capfilt.inference.batches import Images

Scores = dict[str, list[list[float]] | None]
"""By the name of a score, its values of each image's texts: "itm" = P(match) in [0, 1], "itc" = cosine in [-1, 1].
None for a score that the filter does not give."""


class Caption(NamedTuple):
    """One text that a captioner wrote of an image, or why there is none."""

    text: str
    """"" where there is none."""
    prompt: str = ""
    """The name of the prompt that it answers; "" for a captioner without named prompts."""
    remark: str = ""
    """What became of it: "caption failed: CLASS" and "caption dropped: RULE" (`tally.no_caption`) where the text is "";
    "cut: RULE" or "copies the web text" of a text that is kept; "" for nothing."""


class Captioner(Protocol):
    """Writes texts for images."""

    @property
    def image_formats(self) -> tuple[ImageFormat, ...]:
        """The pictures that it reads; none for one that reads the bytes of a sample."""

    def prepare(self, images: Images) -> None:
        """Compute what depends on the images alone, so that its time is not counted as that of the texts."""

    def caption(self, images: Images, samples: Sequence[Sample]) -> list[list[Caption]]:
        """Some texts for each image, as many for each; `samples` are those of the images, in their order."""


@runtime_checkable
class AsksAhead(Protocol):
    """A captioner that waits for answers of others, and is shown the pictures of later batches meanwhile."""

    @property
    def ahead(self) -> int:
        """How many pictures beyond the batch that is waited for."""

    def shard(self, name: str) -> AbstractContextManager[None]:
        """The time in which the pictures of a shard are shown; at its end nothing of it is asked any more."""

    def ask(self, sample: Sample, picture: Image.Image) -> None:
        """Begin with a sample, whose decoded picture is shown; called from several threads."""


class Filter(Protocol):
    """Scores texts of images."""

    @property
    def image_formats(self) -> tuple[ImageFormat, ...]:
        """The pictures that it reads; none for one that reads the bytes of a sample."""

    def prepare(self, images: Images) -> None:
        """Compute what depends on the images alone, so that its time is not counted as that of the texts."""

    def score(self, images: Images, texts: Sequence[Sequence[str]]) -> Scores:
        """The scores of each image's texts, any number of them; an image may have none."""

    def reads_all(self, text: str) -> bool:
        """Whether a text is scored by all of it, not by its first words or tokens only."""
