"""Images: from bytes of any origin to an upright RGB picture.

A small file may hold a huge picture, so one is refused by the size in its header, before a pixel is decoded. Python's
warning filters are global and not thread-safe, so the first `decode` silences Pillow's warnings for the whole process.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO

import numpy as np
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import jpeg_factory
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from capfilt.errors import ImageError

MAX_PIXELS = 64_000_000
"""A 64 megapixel picture decodes to 192 MB; Pillow's own alarm starts at 89 million."""

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's normalisation, which BLIP took over."""

# Chosen by their first bytes, not by Image.open, which warns about large pictures before their size is known.
_OPENERS: tuple[tuple[bytes, Callable[[IO[bytes]], ImageFile]], ...] = (
    (b"\xff\xd8\xff", jpeg_factory),
    (b"\x89PNG\r\n\x1a\n", PngImageFile),
    (b"RIFF", WebPImageFile),
    (b"GIF8", GifImageFile),
    (b"BM", BmpImageFile),
)
# Everything Pillow's plugins have been seen to raise on damaged bytes.
_DAMAGE = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError,
    struct.error, zlib.error,
)  # fmt: skip
_ORIENTATION = 0x0112
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PILLOW_MODULES = re.compile(r"PIL\.")
_TAIL = 2**16  # last bytes that are searched for a picture's end mark: cameras append data behind it


@dataclass(frozen=True)
class Header:
    """The header of a picture, read before a pixel is decoded."""

    format: str
    """Pillow's name of the format."""
    width: int
    """Pixels as stored: EXIF rotation is not applied."""
    height: int
    is_plain: bool
    """Whether it is stored upright, with 8 bits a channel."""


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a JPEG, PNG, WebP, GIF or BMP into an upright RGB picture; safe to call from many threads.

    EXIF rotation is applied, transparency is laid on white, 16-bit grey is scaled to 8 bits (Pillow alone would clip it
    to white), of an animation the first frame is taken.

    Raises:
        ImageError: "not an image", "truncated image", "broken image" or "too many pixels (W x H, limit N)".
    """
    _silence_pillow()
    try:
        image = _open(data)
        _check_size(image, max_pixels)
        image.load()
        return _upright(_rgb(image), _orientation(image))
    except Image.DecompressionBombError as error:
        raise ImageError(f"too many pixels (limit {max_pixels})") from error
    except _DAMAGE as error:
        cut = "truncat" in str(error).lower()
        raise ImageError("truncated image" if cut else "broken image") from error


def convert(image: Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The same upright RGB picture from one that Pillow has opened, or that was made in memory.

    Raises:
        ImageError: as `decode`, of a file that Pillow reads only now.
    """
    _silence_pillow()
    _check_size(image, max_pixels)
    try:
        image.load()
        return _upright(_rgb(image), _orientation(image))
    except _DAMAGE as error:
        raise ImageError("broken image") from error


def inspect(data: bytes, max_pixels: int = MAX_PIXELS) -> Header:
    """Read a picture's header; of pixels at most those are decoded that stand before a PNG's late EXIF.

    Raises:
        ImageError: "not an image", "broken image" or "too many pixels (W x H, limit N)".
    """
    _silence_pillow()
    try:
        image = _open(data)
        _check_size(image, max_pixels)
        # Pillow decodes all of a PNG to find that it has no EXIF.
        is_turned = (image.format != "PNG" or b"eXIf" in data) and _orientation(image) in _TRANSPOSES
        is_plain = not is_turned and not image.mode.startswith("I")
        return Header(image.format or "", *image.size, is_plain)
    except Image.DecompressionBombError as error:
        raise ImageError(f"too many pixels (limit {max_pixels})") from error
    except _DAMAGE as error:
        raise ImageError("broken image") from error


def has_end(data: bytes) -> bool:
    """Whether a picture's bytes go on to its end mark; True for a format that has none."""
    if data.startswith(b"\xff\xd8"):
        return b"\xff\xd9" in data[-_TAIL:]
    if data.startswith(b"\x89PNG"):
        return b"IEND" in data[-_TAIL:]
    if data.startswith(b"GIF8"):
        return b"\x3b" in data[-_TAIL:]
    if data.startswith(b"RIFF"):
        return len(data) >= 8 + int.from_bytes(data[4:8], "little")
    return True


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"too many pixels ({width} x {height}, limit {max_pixels})")


def _open(data: bytes) -> ImageFile:
    for magic, opener in _OPENERS:
        if data.startswith(magic):
            return opener(io.BytesIO(data))
    raise ImageError("not an image")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; 257 = 65535 / 255
        grey = np.asarray(image).astype(np.float32) / 257
        return Image.fromarray(np.clip(grey + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1 (as stored) where the EXIF is damaged: no reason to lose the picture."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except _DAMAGE:
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TRANSPOSES[orientation]) if orientation in _TRANSPOSES else image


def _silence_pillow() -> None:
    # The filter must be the first: one that was added after it would take precedence.
    if ("ignore", None, Warning, _PILLOW_MODULES, 0) not in warnings.filters[:1]:
        warnings.filterwarnings("ignore", module=_PILLOW_MODULES.pattern)
