"""Joins the samples of two runs on the uid of their images.

Each sample keeps the images whose uids have the smallest hashes, so below the smaller of the two limits both are
complete: what is joined is a uniform sample of all images that the runs share, in whatever shards they lie.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from capfilt.data.annotations import Annotation
from capfilt.reporting.sampling import RoundSample, SampledImage, random_rank

ABSENT, DROPPED, KEPT, FAILED = -1, 0, 1, 2
"""Verdicts as the page has them; before a policy ran, KEPT is a text that passes the threshold to try."""


@dataclass(frozen=True)
class Decided:
    """What one run says of a text."""

    row: Annotation
    verdict: int
    reason: str


@dataclass(frozen=True)
class JoinedText:
    """A text of an image; a run that does not have it has None."""

    source: str
    text: str
    sides: tuple[Decided | None, Decided | None]

    @property
    def both(self) -> tuple[Decided, Decided] | None:
        """What the two runs say of it, where both have it."""
        first, second = self.sides
        return None if first is None or second is None else (first, second)


@dataclass(frozen=True)
class JoinedImage:
    """An image that both runs have."""

    first: SampledImage
    second: SampledImage
    texts: list[JoinedText]


@dataclass(frozen=True)
class Joined:
    """The images that are in both samples, in random order, of those that both samples would hold."""

    images: list[JoinedImage]
    candidates: tuple[int, int]
    """How many images of each run were looked up in the other."""
    whole: bool
    """Whether these are all images of both runs."""

    def texts(self) -> Iterator[JoinedText]:
        for image in self.images:
            yield from image.texts


def join(first: RoundSample, second: RoundSample) -> Joined:
    """The images of two samples with the same uid; a picture that a run has under several keys counts once."""
    limit = min(first.limit, second.limit)
    sides = [_by_uid(image for image in sample.images if random_rank(image) < limit) for sample in (first, second)]
    images = [
        JoinedImage(image, sides[1][uid], _join_texts(first, image, second, sides[1][uid]))
        for uid, image in sides[0].items()
        if uid in sides[1]
    ]
    return Joined(images, (len(sides[0]), len(sides[1])), first.has_all and second.has_all)


def _by_uid(images: Iterable[SampledImage]) -> dict[str, SampledImage]:
    by_uid: dict[str, SampledImage] = {}
    for image in images:
        if image.uid:  # a picture that could not be read has none
            by_uid.setdefault(image.uid, image)
    return by_uid


def _join_texts(first: RoundSample, image: SampledImage, second: RoundSample, other: SampledImage) -> list[JoinedText]:
    """The texts of an image in the first run's order, then what only the second has."""
    theirs: dict[tuple[str, str], list[Decided]] = {}
    for decided in _decide(second, other):
        theirs.setdefault((decided.row.source, decided.row.text), []).append(decided)
    texts = []
    for decided in _decide(first, image):
        key = decided.row.source, decided.row.text
        same = theirs[key].pop(0) if theirs.get(key) else None
        texts.append(JoinedText(*key, (decided, same)))
    rest = [JoinedText(*key, (None, decided)) for key, left in theirs.items() for decided in left]
    return sorted([*texts, *rest], key=lambda text: text.source == "synthetic")


def _decide(sample: RoundSample, image: SampledImage) -> Iterator[Decided]:
    """A run's verdict on each text of an image: its policy's, else whether it passes the threshold to try."""
    score, threshold = sample.opening
    for row, why in image.rows:
        reason = why or ""
        if sample.source.dataset is None and not why:
            value = row.score(score)
            reason = f"no {score} score" if value is None else f"{score} below threshold" if value < threshold else ""
        yield Decided(row, FAILED if row.status == "failed" else DROPPED if reason else KEPT, reason)
