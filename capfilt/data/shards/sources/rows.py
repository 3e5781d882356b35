"""From a picture's bytes, its texts and what else is known of it to a sample, as its members in a tar would give it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from capfilt.data.sample import FailedSample, Sample
from capfilt.data.shards.keys import key_problem, tar_key
from capfilt.data.shards.members import IMAGES, MAX_IMAGE, MAX_TEXT
from capfilt.data.shards.sources.view import failed

_UNREAD = {b"GIF8": "gif", b"BM": "bmp", b"II*\0": "tiff", b"MM\0*": "tiff", b"<svg": "svg", b"<?xm": "svg"}


@dataclass(frozen=True)
class Row:
    """What a table says of a picture."""

    texts: tuple[str, ...] = ()
    source: str = "web"
    """Where the texts come from."""
    meta: Mapping[str, Any] = field(default_factory=dict)

    def problem(self) -> str:
        """Why its texts cannot be used, or ""."""
        said = [*self.texts, *(value for value in self.meta.values() if isinstance(value, str))]
        if sum(map(len, said)) > MAX_TEXT // 4:  # a character takes four bytes at most
            return f"a row with more than {MAX_TEXT // 2**22} million characters"
        try:
            "".join(self.texts).encode()
        except UnicodeError:
            return "text is not UTF-8"
        return ""


def with_row(sample: Sample, row: Row) -> Sample | FailedSample:
    """A sample with what a table says of it; what its own files say stands before that."""
    if problem := row.problem():
        return failed(sample.key, problem)
    meta = {**row.meta, **sample.meta}
    if "captions" not in sample.meta and row.source != "web":
        meta["captions"] = [{"text": text, "source": row.source} for text in row.texts]
    elif "captions" not in sample.meta and len(row.texts) > 1:
        meta["captions"] = list(row.texts)  # web texts, beside a txt that there may be
    return replace(sample, text=sample.text or "".join(row.texts[:1]), meta=meta)


def make(key: str, image: bytes | None, row: Row, seen: set[str]) -> Sample | FailedSample:
    """The sample of a row; its key is added to `seen`."""
    problem = key_problem(key, seen)
    if problem:
        return failed(key, problem)
    seen.add(tar_key(key))
    if not image:
        return failed(key, "no image")
    if len(image) > MAX_IMAGE:
        return failed(key, f"an image larger than {MAX_IMAGE // 2**20} MiB")
    if not (extension := _extension(image)):
        kind = next((name for magic, name in _UNREAD.items() if image.startswith(magic)), "")
        return failed(key, f"{kind or 'what these bytes are'} is not read ({', '.join(IMAGES)} are)")
    return with_row(Sample(key, image, extension, ""), row)


def texts_of(value: object) -> tuple[str, ...]:
    """The texts of a value: one, a list, or none."""
    values = value if isinstance(value, list) else [value]
    return tuple(text for text in values if isinstance(text, str) and text)


def meta_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Single values as a json may have them; those that are missing, or no number, are left out."""
    return {
        name: value
        for name, value in values.items()
        if value is not None and not (isinstance(value, float) and not math.isfinite(value))
    }


def _extension(data: bytes) -> str:
    if data.startswith(b"\xff\xd8"):
        return "jpg"
    if data.startswith(b"\x89PNG"):
        return "png"
    return "webp" if data.startswith(b"RIFF") and data[8:12] == b"WEBP" else ""
