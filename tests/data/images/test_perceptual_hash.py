"""The hash is imagehash's, bit for bit, and reads every picture that the decoder reads."""

from __future__ import annotations

import io
from pathlib import Path

import imagehash
import numpy as np
import pytest
from PIL import Image, ImageFilter

from capfilt.data.images.decode import decode
from capfilt.data.images.perceptual_hash import perceptual_hash


def theirs(image: Image.Image) -> int:
    return int(str(imagehash.phash(image)), 16)


def smooth(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    return noise.filter(ImageFilter.GaussianBlur(rng.uniform(0, 8)))


def test_hash_is_that_of_imagehash_on_random_pictures() -> None:
    rng = np.random.default_rng(0)
    pictures = [smooth(rng, *rng.integers(1, 200, 2)) for _ in range(300)]
    assert [perceptual_hash(one) for one in pictures] == [theirs(one) for one in pictures]
    assert len({perceptual_hash(one) for one in pictures}) > 250


def test_hash_is_that_of_imagehash_on_photographs(shared_dir: Path) -> None:
    photos = sorted((shared_dir / "photos").rglob("*.jpg"))[:200]
    if not photos:
        pytest.skip("no photographs in the folder of reference material")
    pictures = [decode(photo.read_bytes()) for photo in photos]
    assert [perceptual_hash(one) for one in pictures] == [theirs(one) for one in pictures]


def encoded(image: Image.Image, format_: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


def odd_pictures() -> dict[str, bytes]:
    photo = smooth(np.random.default_rng(1), 90, 60)
    grey16 = Image.fromarray(np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64))
    frames = [photo, photo.rotate(90), photo.rotate(180)]
    return {
        "one pixel": encoded(Image.new("RGB", (1, 1), "red"), "PNG"),
        "one line": encoded(photo.resize((500, 1)), "PNG"),
        "palette": encoded(photo.quantize(16), "PNG"),
        "palette with transparency": encoded(photo.quantize(16), "PNG", transparency=0),
        "16 bits": encoded(grey16, "PNG"),
        "CMYK": encoded(photo.convert("CMYK"), "JPEG"),
        "bilevel": encoded(photo.convert("1"), "PNG"),
        "animated": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated WebP": encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
    }


@pytest.mark.parametrize("kind", odd_pictures())
def test_every_picture_of_the_decoder_has_a_hash(kind: str) -> None:
    picture = decode(odd_pictures()[kind])
    assert perceptual_hash(picture) == theirs(picture)


@pytest.mark.parametrize("colour", ["white", "black", "red", (7, 9, 200)])
def test_plain_pictures_of_any_colour_and_size_have_one_hash(colour: str) -> None:
    """Black too has no coefficient above the median, so it is the one that differs."""
    plain = [perceptual_hash(Image.new("RGB", size, colour)) for size in ((1, 1), (64, 64), (333, 20))]
    assert set(plain) == {0 if colour == "black" else 1 << 63}


def test_rounding_decides_no_bit_of_a_symmetric_picture() -> None:
    """Every odd frequency of a mirrored picture is 0 but for rounding."""
    left = np.asarray(smooth(np.random.default_rng(2), 16, 32))
    both = Image.fromarray(np.concatenate([left, left[:, ::-1]], axis=1))
    bits = np.array([*f"{perceptual_hash(both):064b}"]).reshape(8, 8)
    assert (bits[:, 1::2] == bits[0, 1]).all()
