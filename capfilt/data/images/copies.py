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


def _cropped(image: Image.Image) -> Image.Image:
    """Without a twentieth at each side: 90 % of the width and of the height."""
    across, down = image.width // 20, image.height // 20
    return image.crop((across, down, image.width - across, image.height - down))


_BICUBIC = Image.Resampling.BICUBIC
COPIES: dict[str, tuple[Callable[[Image.Image], Image.Image], int]] = {
    **{f"jpeg {quality}": (lambda image: image, quality) for quality in (95, 75, 50, 30)},
    "half size": (lambda image: image.resize([max(1, side // 2) for side in image.size], _BICUBIC), _QUALITY),
    "grey": (lambda image: image.convert("L"), _QUALITY),
    "crop 10 %": (_cropped, _QUALITY),
    "mirrored": (ImageOps.mirror, _QUALITY),
}
"""What is done to the picture, and the quality of the JPEG, by the name of the kind."""
