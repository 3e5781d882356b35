from __future__ import annotations

import base64
import io
from typing import Any

import pytest
from PIL import Image

from capfilt.data.images import decode
from capfilt.inference.captioners.endpoint import requests
from capfilt.inference.captioners.endpoint.requests import data_url, key_of, sampling, seed_of
from capfilt.inference.config import AnnotateConfig


def sent(image: bytes, side: int = 64, quality: int = 90) -> tuple[str, bytes]:
    kind, _, data = data_url(image, decode.decode(image), side, quality).removeprefix("data:").partition(";base64,")
    return kind, base64.b64decode(data)


def encoded(kind: str, width: int, height: int, mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.radial_gradient("L").resize((width, height)).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_picture_that_fits_goes_as_it_is(kind: str) -> None:
    image = encoded(kind, 64, 40)
    assert sent(image) == (f"image/{kind.lower()}", image)


@pytest.mark.parametrize(("width", "height", "size"), [(65, 40, (64, 39)), (40, 650, (4, 64)), (5000, 2, (64, 1))])
def test_a_larger_one_is_made_smaller_and_keeps_its_shape(width: int, height: int, size: tuple[int, int]) -> None:
    kind, data = sent(encoded("PNG", width, height))
    assert (kind, Image.open(io.BytesIO(data)).size) == ("image/jpeg", size)
    assert len(sent(encoded("PNG", 650, 400), quality=10)[1]) < len(sent(encoded("PNG", 650, 400), quality=95)[1])


def test_what_servers_may_read_otherwise_goes_as_a_jpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture that lies on its side, with 16 bits, of another format, or with a megabyte of something else."""
    exif = Image.Exif()
    exif[0x0112] = 6
    kind, data = sent(encoded("JPEG", 60, 20, exif=exif))
    assert (kind, Image.open(io.BytesIO(data)).size) == ("image/jpeg", (20, 60))
    for image in (encoded("PNG", 20, 20, "I;16"), encoded("GIF", 20, 20), encoded("BMP", 20, 20)):
        assert sent(image)[0] == "image/jpeg"
        assert sent(image)[1] != image
    monkeypatch.setattr(requests, "MAX_ORIGINAL", 100)
    assert sent(encoded("PNG", 60, 20))[0] == "image/jpeg"


def test_how_it_draws_is_said_in_the_protocols_words_and_others_only_where_they_are_set() -> None:
    def fields(**tree: Any) -> dict[str, Any]:
        return sampling(AnnotateConfig.model_validate(tree))

    assert fields() == {"max_tokens": 64, "temperature": 1.0, "top_p": 0.9}
    assert fields(decode={"method": "greedy"}) == {"max_tokens": 64, "temperature": 0.0}
    assert fields(
        decode={"top_k": 50, "repetition_penalty": 1.1, "temperature": 0.7},
        vlm={"max_new_tokens": 9, "stop": list("abcdef")},
        endpoint={"limit_field": "max_completion_tokens"},
    ) == {
        "max_completion_tokens": 9, "temperature": 0.7, "top_p": 0.9, "stop": list("abcd"), "top_k": 50,
        "repetition_penalty": 1.1,
    }  # fmt: skip


def test_every_text_has_a_seed_and_every_request_a_name() -> None:
    of = {seed_of(s, r, u, c) for s in (0, 1) for r in (0, 1) for u in ("a" * 32, "b" * 32) for c in range(3)}
    assert len(of) == 24
    assert all(0 <= seed < 2**31 for seed in of)
    assert seed_of(3, 1, "a" * 32, 2) == 1058921499, "never another: cached answers depend on it"
    assert key_of("x", 1, {"a": 1, "b": 2}) == key_of("x", 1, {"b": 2, "a": 1})
    assert key_of("x", 1) != key_of("x", "1") != key_of("x1")
