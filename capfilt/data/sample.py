"""What travels through the pipeline: a `Sample`, one image with its texts, or a `FailedSample` in its place.

An image may change its key between two downloads, never its `uid`: joins go through the uid.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeGuard

_UID = re.compile(r"[0-9a-fA-F]{32}")

SOURCES = ("web", "synthetic", "human")
"""Where a text may come from: the crawl, a captioner, an annotator."""


def is_text(text: str) -> bool:
    """Whether a text has something to read: a letter, a number, or a pictorial symbol such as an emoji.

    That is at least one character of Unicode's categories L*, N* or So. White space, control characters, punctuation
    and signs of mathematics and currency ("...", "---", "|", "$") are no text on their own.
    """
    return any((category := unicodedata.category(c))[0] in "LN" or category == "So" for c in text)


@dataclass(frozen=True)
class Sample:
    """One image, exactly the bytes that came in, with its text and its metadata."""

    key: str
    image: bytes
    """Encoded."""
    extension: str
    """jpg | jpeg | png | webp"""
    text: str
    """Its txt, else the json's `caption`, else ""."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Its json."""
    extras: dict[str, bytes] = field(default_factory=dict)
    """Other members under its key, by extension, where the reader was asked for them."""

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.image).hexdigest()

    @property
    def uid(self) -> str:
        """The stable id of 32 hex digits: DataComp's `uid` from the json, else the first half of the image's sha256."""
        uid = self.meta.get("uid")
        if isinstance(uid, str) and _UID.fullmatch(uid):
            return uid.lower()
        return self.sha256[:32]

    @cached_property
    def all_captions(self) -> list[dict[str, Any]]:
        """All texts that came with this image, as `{"text", "source", ...}`, even those that are no text (`is_text`).

        `captions` of the json are the image's texts where each names its source (`SOURCES`), as `select` writes them.
        Those of other datasets, strings or `{"text": ...}` or `{"caption": ...}` (COCO), count as web texts and come
        after the txt, which they do not replace.
        """
        value = self.meta.get("captions")
        entries = value if isinstance(value, list) else [value]
        captions = [caption for entry in entries if (caption := _caption(entry)) is not None]
        txt: dict[str, Any] = {"text": self.text, "source": "web"}
        if not captions:
            return [txt]
        if all(map(_names_its_source, entries)) or self.text in ("", *(caption["text"] for caption in captions)):
            return captions
        return [txt, *captions]

    @cached_property
    def captions(self) -> list[dict[str, Any]]:
        """The texts of this image, as `{"text", "source", ...}`; none where there is nothing to read."""
        return [caption for caption in self.all_captions if is_text(caption["text"])]


@dataclass(frozen=True)
class FailedSample:
    """An input that could not be read: its key, or the shard's name, and a short reason."""

    key: str
    reason: str


def skip_positions(
    items: Iterable[Sample | FailedSample], reasons: Mapping[int, str]
) -> Iterator[Sample | FailedSample]:
    """The items of a shard, with a FailedSample in place of each whose position `reasons` has."""
    for position, item in enumerate(items):
        yield FailedSample(item.key, reasons[position]) if position in reasons else item


def _names_its_source(entry: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(entry, dict) and isinstance(entry.get("text"), str) and entry.get("source") in SOURCES


def _caption(entry: object) -> dict[str, Any] | None:
    """One entry of a json's `captions` as `{"text", "source", ...}`; None for one without a text."""
    if _names_its_source(entry):
        return entry
    if isinstance(entry, dict):
        entry = next((entry[name] for name in ("text", "caption") if isinstance(entry.get(name), str)), None)
    return {"text": entry, "source": "web"} if isinstance(entry, str) else None
