"""A 64-bit perceptual hash of a picture (DCT pHash), equal for copies that differ by compression, size or a filter.

Of pictures without structure nothing but the first bit is set, whatever their colour: they all count as one picture.

The hash is that of `imagehash.phash` (tests compare them bit for bit), without scipy: the upright RGB picture on white
(`decode`) to grey by ITU-R 601 (Pillow's "L"), to 32 x 32 pixels by Pillow's Lanczos filter, DCT-II of columns and
rows, of which the 8 x 8 lowest frequencies (the mean included) are compared with their median. Bit 63 is the mean's,
then row by row; a bit is 1 above the median. Coefficients that differ by rounding alone count as equal, where in
imagehash's code rounding decides.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

SIDE = 32
"""Pixels of the side of the picture that is transformed."""

_LOW = 8  # frequencies of each axis
_DECIMALS = 6  # of coefficients up to 2**20, whose rounding errors are below 1e-9


_FREQUENCY, _PIXEL = np.mgrid[:_LOW, :SIDE]
_DCT = 2 * np.cos(np.pi * _FREQUENCY * (2 * _PIXEL + 1) / (2 * SIDE))
"""The lowest rows of the DCT-II, float64 [8, 32]."""


def perceptual_hash(image: Image.Image) -> int:
    """The hash of an upright RGB picture of any size, as an unsigned integer of 64 bits."""
    grey = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS), np.float64)
    low = np.round(_DCT @ grey @ _DCT.T, _DECIMALS)
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")
