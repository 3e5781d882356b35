"""Random views of training pictures: crop, mirror and the ten operations of RandAugment that BLIP keeps.

BLIP leaves the colours alone, so that "a red bus" stays true, and at its magnitude of 5 two of the ten operations,
Brightness and Sharpness, change nothing: their factor is 5 / 10 x 1.8 + 0.1 = 1. The public code draws with OpenCV;
these are Pillow's operations of the same meaning, bilinear too, equal up to rounding and half a pixel.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from pydantic import model_validator

from capfilt.config import Config
from capfilt.data.images.preprocess import ImageFormat

FILL = (128, 128, 128)
"""What shows where a picture was moved away."""
ASPECT = (3 / 4, 4 / 3)
"""Width to height of a crop."""
APPLIED = 0.5
"""How often an operation that was drawn is applied."""
_TRIES = 10


class AugmentConfig(Config):
    """What happens to a training picture before the model sees it; the default is nothing but the resizing."""

    crop: tuple[float, float] | None = None
    """Share of the area that a random crop keeps, at least and at most. BLIP: 0.2 to 1, in fine-tuning 0.5 to 1."""
    flip: bool = False
    """Mirror every other picture."""
    randaugment: tuple[int, int] | None = None
    """How many operations are drawn, and their magnitude from 0 to 10. BLIP: 2 and 5."""

    @property
    def at_random(self) -> bool:
        """Whether anything is drawn; else a picture looks the same each time."""
        return self.flip or self.crop is not None or self.randaugment is not None

    @model_validator(mode="after")
    def _sensible(self) -> AugmentConfig:
        if self.crop is not None and not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise ValueError(f"crop {list(self.crop)}: two shares of the area, 0 < least <= most <= 1")
        check_randaugment(self.randaugment)
        return self


def check_randaugment(drawn: tuple[int, int] | None) -> None:
    """Refuse a number of operations or a magnitude that makes no sense; ValueError."""
    if drawn is not None and not (drawn[0] > 0 and 0 <= drawn[1] <= 10):
        raise ValueError(f"randaugment {list(drawn)}: how many (from 1), and a magnitude from 0 to 10")


def generator(seed: int, *place: int | str) -> np.random.Generator:
    """The draws of one place in a training, such as a row counted over all epochs and its uid: a function of these and
    of nothing before."""
    digest = hashlib.blake2b("|".join(map(str, (seed, *place))).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "big")))


def augment(
    image: Image.Image, image_format: ImageFormat | int, config: AugmentConfig, rng: np.random.Generator
) -> np.ndarray:
    """An RGB picture in a format (a number: of BLIP's pictures of that size), uint8 [H, W, 3], changed at random: crop,
    then mirror, then RandAugment.

    With the default config it is `ImageFormat.to_pixels`, bit for bit, and nothing is drawn. A crop is squashed to the
    format's square, whatever the format does to whole pictures. ImageError as `Preprocess.to_pixels` raises.
    """
    image_format = ImageFormat(image_format) if isinstance(image_format, int) else image_format
    if config.crop is None:
        pixels = image_format.to_pixels(image)
    else:
        pixels = image_format.crop_to_pixels(image.crop(crop_box(*image.size, config.crop, rng)))
    if config.flip and rng.random() < 0.5:
        pixels = np.ascontiguousarray(pixels[:, ::-1])
    if config.randaugment is None:
        return pixels
    return randaugment(pixels, config.randaugment, tuple(OPERATIONS), rng)


def randaugment(
    pixels: np.ndarray, drawn: tuple[int, int], names: Sequence[str], rng: np.random.Generator
) -> np.ndarray:
    """A picture, uint8 [H, W, 3], changed by so many operations of this magnitude, of these names."""
    count, magnitude = drawn
    picture = Image.fromarray(pixels)
    for name in rng.choice(list(names), count):  # with replacement
        if rng.random() < APPLIED:
            picture = OPERATIONS[name](picture, magnitude, 1 if rng.random() < 0.5 else -1)
    return np.array(picture, dtype=np.uint8)


def crop_box(
    width: int, height: int, share: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """A random box of `share` of the area and an aspect within `ASPECT`, even in its logarithm, as torchvision draws.

    A picture so long that none of ten draws fits into it gives its middle, cut to the nearest aspect.
    """
    for _ in range(_TRIES):
        area = width * height * rng.uniform(*share)
        aspect = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, max(1, round(height * ASPECT[1]))), min(height, max(1, round(width / ASPECT[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


# ---- the operations: (picture, magnitude 0..10, sign 1 or -1) -> picture of the same size ----

Operation = Callable[[Image.Image, int, int], Image.Image]


def enhancement(magnitude: int) -> float:
    """The factor of Brightness and Sharpness: 1, which is no change, at BLIP's magnitude of 5."""
    return magnitude / 10 * 1.8 + 0.1


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    """The pixel at (x, y) comes from (a x + b y + c, d x + e y + f)."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=FILL)


OPERATIONS: dict[str, Operation] = {
    "Identity": lambda image, *_: image,
    "AutoContrast": lambda image, *_: ImageOps.autocontrast(image),
    "Brightness": lambda image, magnitude, _: ImageEnhance.Brightness(image).enhance(enhancement(magnitude)),
    "Sharpness": lambda image, magnitude, _: ImageEnhance.Sharpness(image).enhance(enhancement(magnitude)),
    "Equalize": lambda image, *_: ImageOps.equalize(image),
    # Rows or columns shifted by 0.03 x magnitude of their place in the picture.
    "ShearX": lambda image, magnitude, sign: _affine(image, 1, sign * magnitude / 10 * 0.3, 0, 0, 1, 0),
    "ShearY": lambda image, magnitude, sign: _affine(image, 1, 0, 0, sign * magnitude / 10 * 0.3, 1, 0),
    # Moved by `magnitude` pixels, whatever the picture's size.
    "TranslateX": lambda image, magnitude, sign: _affine(image, 1, 0, sign * magnitude, 0, 1, 0),
    "TranslateY": lambda image, magnitude, sign: _affine(image, 1, 0, 0, 0, 1, sign * magnitude),
    "Rotate": lambda image, magnitude, sign: image.rotate(
        sign * magnitude * 3, Image.Resampling.BILINEAR, fillcolor=FILL
    ),
}
"""The ten that BLIP pretrains with (public code); of RandAugment's fourteen, those that change hues are left out."""
COLOURS = ("Identity", "AutoContrast", "Equalize", "Brightness", "Sharpness")
"""Those that leave every pixel where it is: X-VLM's, for pictures with boxes."""
