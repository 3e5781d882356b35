"""What travels through the pipeline: a `Sample` (one image with its texts) or the `Fault` that took its
place.

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
    """Whether there is something to read: a letter, a digit or other number, or a pictorial symbol such as an emoji.

    In Unicode's categories: one character at least of L*, N* or So. White space, control characters, punctuation and
    the signs of mathematics, currency and typewriters ("...", "---", "|", "$") are no text on their own.
    """
    return any((category := unicodedata.category(c))[0] in "LN" or category == "So" for c in text)


@dataclass(frozen=True)
class Sample:
    """One image, exactly the bytes that came in, with its text and everything the crawl said about it."""

    key: str
    image: bytes
    extension: str
    text: str
    meta: dict[str, Any] = field(default_factory=dict)
    extras: dict[str, bytes] = field(default_factory=dict)
    """What else lay under its key, by extension, where that was asked for."""

    @cached_property
    def sha256(self) -> str:
        """Hex digest of the image bytes."""
        return hashlib.sha256(self.image).hexdigest()

    @property
    def uid(self) -> str:
        """The stable 32-hex id: DataComp's `uid` from the json, else the head of the image's sha256."""
        found = self.meta.get("uid")
        if isinstance(found, str) and _UID.fullmatch(found):
            return found.lower()
        return self.sha256[:32]

    @cached_property
    def all_captions(self) -> list[dict[str, Any]]:
        """What came in as a text of this image, as `{"text", "source", ...}`, also what is no text (`is_text`).

        `captions` of the json are the image's texts where each names its source (`SOURCES`), which is how `select`
        writes them. Other people's, strings or `{"text": ...}` or `{"caption": ...}` (COCO), count as web texts and
        stand after the txt, which they do not replace.
        """
        listed = self.meta.get("captions")
        entries = listed if isinstance(listed, list) else [listed]
        found = [caption for entry in entries if (caption := _caption(entry)) is not None]
        own: dict[str, Any] = {"text": self.text, "source": "web"}
        if not found:
            return [own]
        if all(map(_names_its_source, entries)) or self.text in ("", *(caption["text"] for caption in found)):
            return found
        return [own, *found]

    @cached_property
    def captions(self) -> list[dict[str, Any]]:
        """The texts of this image, as `{"text", "source", ...}`; none where there is nothing to read."""
        return [caption for caption in self.all_captions if is_text(caption["text"])]


@dataclass(frozen=True)
class Fault:
    """An input that could not be read: its key (or the shard's name) and a short reason."""

    key: str
    reason: str


def skip_positions(items: Iterable[Sample | Fault], places: Mapping[int, str]) -> Iterator[Sample | Fault]:
    """Walk what was read of a shard; at each of these places stands a Fault with the reason given."""
    for place, item in enumerate(items):
        yield Fault(item.key, places[place]) if place in places else item


def _names_its_source(entry: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(entry, dict) and isinstance(entry.get("text"), str) and entry.get("source") in SOURCES


def _caption(entry: object) -> dict[str, Any] | None:
    """One entry of a json's `captions` as `{"text", "source", ...}`; None for what holds no text."""
    if _names_its_source(entry):
        return entry
    if isinstance(entry, dict):
        entry = next((entry[name] for name in ("text", "caption") if isinstance(entry.get(name), str)), None)
    return {"text": entry, "source": "web"} if isinstance(entry, str) else None
