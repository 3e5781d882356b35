"""Copies of a picture as the web makes them, on which a descriptor of pictures is tested.

Each is a JPEG, since whoever copies a picture saves it anew.
"""

from __future__ import annotations

import io
from collections.abc import Callable

from PIL import Image, ImageOps

_QUALITY = 90  # of the copies that are changed otherwise


def copy_of(image: Image.Image, kind: str) -> bytes:
    """The JPEG of a copy, of a kind of COPIES, of an upright RGB picture."""
    change, quality = COPIES[kind]
    file = io.BytesIO()
    change(image).save(file, "JPEG", quality=quality)
    return file.getvalue()


def _same(image: Image.Image) -> Image.Image:
    return image


def _half(image: Image.Image) -> Image.Image:
    return image.resize((max(1, image.width // 2), max(1, image.height // 2)), Image.Resampling.BICUBIC)


def _grey(image: Image.Image) -> Image.Image:
    return image.convert("L")


def _cropped(image: Image.Image) -> Image.Image:
    """Without a twentieth at each side: 90 % of the width and of the height."""
    across, down = image.width // 20, image.height // 20
    return image.crop((across, down, image.width - across, image.height - down))


COPIES: dict[str, tuple[Callable[[Image.Image], Image.Image], int]] = {
    "jpeg 95": (_same, 95),
    "jpeg 75": (_same, 75),
    "jpeg 50": (_same, 50),
    "jpeg 30": (_same, 30),
    "half size": (_half, _QUALITY),
    "grey": (_grey, _QUALITY),
    "crop 10 %": (_cropped, _QUALITY),
    "mirrored": (ImageOps.mirror, _QUALITY),
}
"""What is done to the picture, and the quality of the JPEG, by the name of the kind."""
