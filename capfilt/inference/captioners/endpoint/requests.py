"""What an endpoint is asked: a picture as a data URL, a prompt, how to draw, and a seed of this text alone."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from typing import Any

from PIL import Image

from capfilt.data.images import decode
from capfilt.inference.captioners.endpoint.client import Request
from capfilt.inference.config import AnnotateConfig

KINDS = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
"""Formats that every server reads, by Pillow's name: they may go as they are."""
MAX_ORIGINAL = 2**20
"""Bytes of a picture that goes as it is; a small picture may carry any amount of metadata."""


def data_url(image: bytes, picture: Image.Image, side: int, quality: int) -> str:
    """A picture as it is sent: its own bytes where it is small enough, upright and of a common format, else a JPEG of
    at most `side` pixels; `picture` is `image` decoded."""
    header = decode.inspect(image)
    fits = max(header.width, header.height) <= side and len(image) <= MAX_ORIGINAL
    kind = KINDS.get(header.format) if fits and header.is_plain else None
    if kind is None:
        kind, image = KINDS["JPEG"], _jpeg(picture, side, quality)
    return f"data:{kind};base64,{base64.b64encode(image).decode()}"


def _jpeg(picture: Image.Image, side: int, quality: int) -> bytes:
    scale = min(1.0, side / max(picture.size))
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    buffer = io.BytesIO()
    picture.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def sampling(config: AnnotateConfig) -> dict[str, Any]:
    """How the endpoint is to draw: the fields of the protocol, and where a setting asks for it those that vLLM and
    SGLang have beside it, which other servers refuse."""
    decode_, beside = config.decode, dict[str, Any]()
    drawn = decode_.method == "nucleus"
    fields: dict[str, Any] = {
        config.endpoint.limit_field: config.vlm.max_new_tokens,
        "temperature": decode_.temperature if drawn else 0.0,
    }
    if drawn:
        fields["top_p"] = decode_.top_p
    if config.vlm.stop:
        fields["stop"] = list(config.vlm.stop[:4])  # as many as OpenAI takes; the guard rails cut at all of them
    if drawn and decode_.top_k:
        beside["top_k"] = decode_.top_k
    if decode_.repetition_penalty != 1:
        beside["repetition_penalty"] = decode_.repetition_penalty
    return fields | beside


def request(url: str, prompt: str, seed: int, fields: dict[str, Any]) -> Request:
    picture = {"type": "image_url", "image_url": {"url": url}}
    content = [picture, {"type": "text", "text": prompt}]
    return {"messages": [{"role": "user", "content": content}], "seed": seed, **fields}


def seed_of(seed: int, round_: int, uid: str, candidate: int) -> int:
    """The seed of one text, 31 bits: servers differ in whether they take more."""
    name = f"{seed}|{round_}|{uid}|{candidate}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "big") >> 1


def key_of(*parts: Any) -> str:
    """The name of a request among the answers that are kept: a digest of what decides its answer."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def probe_request(fields: dict[str, Any], seed: int = 0) -> Request:
    """A request that any server of a model that sees should answer: of a red square, in few words."""
    square = Image.new("RGB", (64, 64), (200, 30, 30))
    url = f"data:image/jpeg;base64,{base64.b64encode(_jpeg(square, 64, 90)).decode()}"
    limited = {name: 16 if name.startswith("max_") else value for name, value in fields.items()}
    return request(url, "Describe this image.", seed, limited)
