"""The pictures of the page: which images get a thumbnail, how many bytes they may take, and the thumbnails."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from PIL import Image

from capfilt.data import shards
from capfilt.data.images import decode as images
from capfilt.data.sample import Sample
from capfilt.errors import ImageError
from capfilt.reporting.sampling import MAX_PAGE_BYTES, ImageId, RoundSample, SampledImage

MAX_THUMBNAILS = 2_400
MAX_THUMBNAIL_BYTES = 12_000_000
"""Bytes of all thumbnails; as base64 they take a third more."""
MIN_SIZE, MAX_SIZE = 128, 480
"""Pixels of a thumbnail's longer side. The page shows it at about 100, and enlarged at up to all that it has."""
BYTES_PER_PIXEL = 0.15
"""Bytes of a WebP of quality 60 per pixel of the square around a photograph, roughly."""


def images_to_show(rounds: Sequence[RoundSample], limit: int = MAX_THUMBNAILS) -> set[ImageId]:
    """The images that get a thumbnail: half of them those nearest to each round's threshold, the rest at random."""
    all_images = {image.id: None for sample in rounds for image in sample.images}
    if len(all_images) <= limit:
        return set(all_images)
    chosen: set[ImageId] = set()
    for sample in rounds:
        score, threshold = sample.opening
        nearest = sorted(sample.images, key=partial(_distance, score=score, threshold=threshold))
        chosen |= {image.id for image in nearest[: limit // (2 * len(rounds))]}
    for image_id in all_images:
        if len(chosen) == limit:
            break
        chosen.add(image_id)
    return chosen


def _distance(image: SampledImage, score: str, threshold: float) -> float:
    """How far the nearest text of an image is from the threshold."""
    scores = (row.score(score) for row, _ in image.rows)
    return min((abs(value - threshold) for value in scores if value is not None), default=np.inf)


def byte_budget(rounds: Sequence[RoundSample]) -> int:
    """Bytes that thumbnails may take beside the texts of the page."""
    texts = sum(sample.num_bytes for sample in rounds)
    return max(0, min(MAX_THUMBNAIL_BYTES, (MAX_PAGE_BYTES - texts) * 3 // 4))


def thumbnails(
    urls: Mapping[str, str], wanted: set[ImageId], max_bytes: int = MAX_THUMBNAIL_BYTES
) -> dict[ImageId, str]:
    """Thumbnails as data: URLs, larger where they are few; a picture that cannot be decoded has none.

    Each shard is read only as far as needed.
    """
    made: dict[ImageId, str] = {}
    bytes_left = max_bytes
    share = max_bytes // max(1, len(wanted))
    size = min(MAX_SIZE, max(MIN_SIZE, math.isqrt(int(share / BYTES_PER_PIXEL))))
    for shard in sorted({shard for shard, _ in wanted if shard in urls}):
        keys = {key for name, key in wanted if name == shard}
        for item in shards.read(urls[shard]):
            if not keys or bytes_left <= 0:
                break
            if isinstance(item, Sample) and item.key in keys:
                keys.remove(item.key)
                if (small := thumbnail(item.image, size, share)) is not None:
                    bytes_left -= len(small)
                    made[shard, item.key] = f"data:image/webp;base64,{base64.b64encode(small).decode()}"
    return made


def thumbnail(data: bytes, size: int = MIN_SIZE, max_bytes: int = 0) -> bytes | None:
    """A picture as WebP of at most `size` pixels, made smaller where it has more than `max_bytes`, down to MIN_SIZE
    pixels; None if it cannot be decoded."""
    try:
        picture = images.decode(data)
    except ImageError:
        return None
    while True:
        picture.thumbnail((size, size), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        # A picture that was small already must not become worse.
        picture.save(buffer, "WEBP", quality=60 if max(picture.size) == size else 90, method=2)
        if buffer.tell() <= max_bytes or max(picture.size) <= MIN_SIZE:
            return buffer.getvalue()
        size = max(MIN_SIZE, max(picture.size) // 2)
