"""What travels through the pipeline: a `Sample` (one image with its texts) or the `Fault` that took its
place.

An image may change its key between two downloads, never its `uid`: joins go through the uid.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

_UID = re.compile(r"[0-9a-fA-F]{32}")


@dataclass(frozen=True)
class Sample:
    """One image, exactly the bytes that came in, with its text and everything the crawl said about it."""

    key: str
    image: bytes
    extension: str
    text: str
    meta: dict[str, Any] = field(default_factory=dict)

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

    @property
    def captions(self) -> list[dict[str, Any]]:
        """The texts of this image as `{"text", "source", ...}`.

        Other people's `captions` (a list of strings, say) are not ours to interpret: the web text stands
        alone then.
        """
        found = self.meta.get("captions")
        if isinstance(found, list) and found and all(_is_caption(entry) for entry in found):
            return found
        return [{"text": self.text, "source": "web"}]


@dataclass(frozen=True)
class Fault:
    """An input that could not be read: its key (or the shard's name) and a short reason."""

    key: str
    reason: str


def leave_out(items: Iterable[Sample | Fault], places: Mapping[int, str]) -> Iterator[Sample | Fault]:
    """Walk what was read of a shard; at each of these places stands a Fault with the reason given."""
    for place, item in enumerate(items):
        yield Fault(item.key, places[place]) if place in places else item


def _is_caption(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("text"), str) and isinstance(entry.get("source"), str)
