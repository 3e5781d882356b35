from __future__ import annotations

import io
import random
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from capfilt.data.images import decode
from capfilt.errors import ImageError


def encoded(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def picture(width=40, height=30):
    """Red above, blue below, with some noise that makes files long enough to cut."""
    noise = np.random.default_rng(0).integers(0, 40, (height, width, 3), dtype=np.uint8)
    noise[: height // 2, :, 0] += 200
    noise[height // 2 :, :, 2] += 200
    return Image.fromarray(noise)


def png_header(width, height):
    """A PNG that claims a size and ends where its pixels should begin."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    head = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + head + struct.pack(">I", 9999) + b"IDAT"


def outcome(data, **limits):
    """What becomes of a picture, as text."""
    try:
        image = decode.decode(data, **limits)
        return f"{image.mode} {image.tobytes().hex()}"
    except ImageError as error:
        return str(error)


def colour(image, position=(0, 0)):
    assert image.mode == "RGB"
    return image.getpixel(position)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP", "GIF", "JPEG"])
def test_every_allowed_format_decodes(kind):
    image = decode.decode(encoded(Image.new("RGB", (1, 1), (255, 0, 0)), kind, quality=100, lossless=True))
    assert image.size == (1, 1)
    assert np.abs(np.subtract(colour(image), (255, 0, 0))).max() <= 2


def test_16_bit_grey_is_scaled_and_not_white():
    grey = np.array([[0, 257 * 100, 257 * 100 + 200, 65535]], dtype=np.uint16)
    found = np.asarray(decode.decode(encoded(Image.fromarray(grey))))
    assert found[0, :, 0].tolist() == [0, 100, 101, 255]
    assert (found == found[..., :1]).all()


def test_cmyk_and_ycck_come_out_in_their_colours():
    found = decode.decode(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100))
    assert np.abs(np.subtract(colour(found), (255, 0, 0))).max() <= 4


@pytest.mark.parametrize(
    "image",
    [
        Image.new("RGBA", (4, 4), (9, 9, 9, 0)),
        Image.new("LA", (4, 4), (9, 0)),
        Image.new("RGBA", (4, 4), (9, 9, 9, 0)).quantize(4),
    ],
)
def test_transparency_is_laid_on_white(image):
    assert colour(decode.decode(encoded(image))) == (255, 255, 255)


@pytest.mark.parametrize(
    ("mode", "fill", "clear"),
    [("P", 0, b"\0"), ("P", 0, 0), ("L", 9, 9), ("RGB", (9, 9, 9), (9, 9, 9)), ("1", 0, 0)],
)
def test_a_transparent_colour_is_laid_on_white(mode, fill, clear):
    assert colour(decode.decode(encoded(Image.new(mode, (4, 4), fill), transparency=clear))) == (
        255,
        255,
        255,
    )


def test_half_transparent_is_mixed_with_white():
    assert colour(decode.decode(encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 128))))) == (255, 127, 127)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_the_first_frame_of_an_animation_is_taken(kind):
    frames = [Image.new("RGB", (8, 8), fill) for fill in ((255, 0, 0), (0, 255, 0))]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert colour(decode.decode(data)) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
    corners = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}  # the orientation that undoes each
    turned = decode._upright(corners, stored.get(orientation, 1))
    found = decode.decode(encoded(turned, exif=exif))
    assert np.array_equal(np.asarray(found), np.asarray(corners))


def test_orientation_agrees_with_pillow():
    from PIL import ImageOps

    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(picture(), exif=exif)
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        assert np.array_equal(np.asarray(decode.decode(data)), np.asarray(expected))


def test_a_damaged_exif_block_does_not_lose_the_picture():
    data = encoded(picture(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f" + b"\xee" * 40)
    assert decode.decode(data).size == (40, 30)


@pytest.mark.parametrize("data", [b"", b"\0", b"<html>", b"%PDF-1.4", b"P6 1 1 255 abc", encoded(picture(), "TIFF")])
def test_what_is_no_image_is_called_so(data):
    with pytest.raises(ImageError, match=r"^not an image$"):
        decode.decode(data)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP", "GIF", "JPEG"])
def test_every_cut_is_refused(kind):
    data = encoded(picture(), kind)
    for length in range(12, len(data) * 3 // 4, max(1, len(data) // 40)):
        with pytest.raises(ImageError, match=r"^(truncated|broken) image$"):
            decode.decode(data[:length])


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_picture_cut_in_its_pixels_is_called_truncated(kind):
    data = encoded(picture(200, 200), kind)
    with pytest.raises(ImageError, match=r"^truncated image$"):
        decode.decode(data[: len(data) // 2])


def test_size_is_refused_by_the_header_alone():
    with pytest.raises(ImageError, match=r"^too many pixels \(8001 x 8000, limit 64000000\)$"):
        decode.decode(png_header(8001, 8000))
    with pytest.raises(ImageError, match=r"^too many pixels \(100000 x 100000, limit 64000000\)$"):
        decode.decode(png_header(100_000, 100_000))
    with pytest.raises(ImageError, match=r"^truncated image$"):
        decode.decode(png_header(100, 100))
    assert decode.decode(encoded(picture(40, 30)), max_pixels=1200).size == (40, 30)
    with pytest.raises(ImageError, match=r"^too many pixels \(40 x 30, limit 1199\)$"):
        decode.decode(encoded(picture(40, 30)), max_pixels=1199)


@pytest.mark.parametrize("width", [16383, 10000])
def test_a_webp_bomb_is_refused(width):
    lossless = 1 << 28 | (16382 << 14) | (width - 1)
    body = b"VP8L" + struct.pack("<I", 100) + b"\x2f" + struct.pack("<I", lossless) + bytes(95)
    with pytest.raises(ImageError, match=r"too many pixels|broken image"):
        decode.decode(b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_damage_raises_anything_but_image_error(data):
    kind = data.draw(st.sampled_from(["PNG", "BMP", "WEBP", "GIF", "JPEG"]))
    broken = bytearray(encoded(picture(12, 9), kind))
    for position in data.draw(st.lists(st.integers(4, len(broken) - 1), min_size=1, max_size=8)):
        broken[position] = data.draw(st.integers(0, 255))
    assert outcome(bytes(broken), max_pixels=10_000).startswith(
        ("RGB", "not an image", "truncated image", "broken image", "too many pixels")
    )


def test_pillow_does_not_warn_and_threads_agree():
    exif = encoded(
        picture(),
        "JPEG",
        exif=b"Exif\0\0II*\0\x08\0\0\0\x02\0" + b"\x12\x01\x03\0\xff\xff\0\0\xff\xff\xff\x7f" * 2,
    )
    jobs = [
        exif,
        encoded(picture()),
        encoded(Image.new("P", (4, 4)), transparency=b"\0"),
        png_header(9000, 9999),
    ] * 25
    random.Random(0).shuffle(jobs)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(outcome, jobs)) == [outcome(data) for data in jobs]
    assert caught == []


def test_real_photographs_decode(shared_dir):
    photos = sorted((shared_dir / "photos").rglob("*.jpg"))[:5]
    if not photos:
        pytest.skip("no photographs in the folder of reference material")
    for photo in photos:
        with Image.open(photo) as expected:
            assert np.array_equal(np.asarray(decode.decode(photo.read_bytes())), np.asarray(expected.convert("RGB")))


class TestInspect:
    @pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
    def test_a_picture_says_its_size(self, form):
        header = decode.inspect(encoded(picture(), form))
        assert (header.format, header.width, header.height, header.is_plain) == (form, 40, 30, True)
        assert decode.has_end(encoded(picture(), form))

    def test_pixels_are_not_decoded(self):
        assert decode.inspect(png_header(3000, 2000)).width == 3000  # it has none
        with pytest.raises(ImageError, match=r"^too many pixels \(50000 x 50000, limit 64000000\)"):
            decode.inspect(png_header(50_000, 50_000) + b"eXIf")

    @pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
    def test_what_stands_on_its_side_is_not_plain(self, form):
        exif = Image.Exif()
        exif[0x0112] = 6
        assert not decode.inspect(encoded(picture(), form, exif=exif)).is_plain
        exif[0x0112] = 1
        assert decode.inspect(encoded(picture(), form, exif=exif)).is_plain

    def test_deep_grey_is_not_plain(self):
        grey = Image.fromarray(np.full((3, 3), 1000, np.uint16))
        assert not decode.inspect(encoded(grey)).is_plain

    def test_what_is_no_picture(self):
        with pytest.raises(ImageError, match=r"^not an image"):
            decode.inspect(b"<html>")
        with pytest.raises(ImageError, match=r"^broken image"):
            decode.inspect(b"\xff\xd8\xff\xe0")
