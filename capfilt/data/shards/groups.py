"""The members of one key, and the sample that they make: one image, its text, its json."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

from capfilt.data.sample import FailedSample, Sample
from capfilt.data.shards.keys import key_problem, tar_key
from capfilt.data.shards.members import (
    CARRIED,
    ESSENTIAL,
    IMAGES,
    OF_A_FAULT,
    PICTURES,
    UNREAD,
    USED,
    Member,
    MemberCounts,
)

MAX_DEPTH = 100
"""Nesting of a json; far below Python's own limit, so that what was read can always be written."""


@dataclass
class Group:
    """The members of one key."""

    key: str
    parts: dict[str, Member] = field(default_factory=dict)
    """By extension, in lower case."""
    problem: str = ""
    """Why they are no sample, though each can be read."""

    def takes(self, member: Member) -> bool:
        """Whether `member` belongs here: an extension that comes twice begins the key anew."""
        return member.key == self.key and member.extension.lower() not in self.parts

    def add(self, member: Member) -> None:
        self.parts[member.extension.lower()] = member

    @property
    def has_text_and_json(self) -> bool:
        """Whether nothing that img2dataset writes for a key is missing."""
        return {"txt", "json"} < self.parts.keys()

    @property
    def is_final(self) -> bool:
        """Whether these are a sample, or a failed one, whatever other members the shard has."""
        if key_problem(self.key, set()) or any(self.parts[name].problem for name in ESSENTIAL if name in self.parts):
            return True
        if self.parts.keys().isdisjoint(PICTURES):
            return False
        if any("." in name and _text_of_picture(name) in self.parts for name in self.parts):
            return False
        return "txt" in self.parts or _has_caption(self.parts.get("json"))

    def outcome(self, seen: set[str], counts: MemberCounts) -> Sample | FailedSample:
        """Make the sample, or say why it failed; adds the key to `seen`, and counts the members."""
        problem = key_problem(self.key, seen) or self._problem()
        if not self.problem:
            seen.add(tar_key(self.key))
        if not problem:
            try:
                sample = self._sample()
            except ValueError as error:
                problem = str(error)
        if problem:
            counts[OF_A_FAULT] += len(self.parts)
            return FailedSample(self.key, problem)
        for name, member in self.parts.items():  # a problem counts without its sizes and places
            counts[USED if name in ESSENTIAL else member.problem.partition(" (")[0] or CARRIED] += 1
        return sample

    def _problem(self) -> str:
        problems = (member.problem for name, member in self.parts.items() if name in ESSENTIAL and member.problem)
        problem = next(problems, self.problem)
        images = [name for name in IMAGES if name in self.parts]
        if problem or len(images) == 1:
            return problem
        unread = [name for name in UNREAD if name in self.parts]
        if unread and not images:
            return f"{unread[0]} is not read ({', '.join(IMAGES)} are)"
        return "more than one image" if images else "no image"

    def _sample(self) -> Sample:
        """The sample of these members; ValueError for a text or json that cannot be used."""
        extension = next(name for name in IMAGES if name in self.parts)
        meta = parse_json(self._data("json", b"{}"))
        text = _text(self._data("txt") if "txt" in self.parts else None, meta)
        extras = {name: m.data for name, m in self.parts.items() if name not in ESSENTIAL and m.data is not None}
        return Sample(self.key, self._data(extension), extension, text, meta, extras)

    def _data(self, name: str, absent: bytes = b"") -> bytes:
        if name not in self.parts:
            return absent
        data = self.parts[name].data
        assert data is not None, "images, texts and jsons are always read"
        return data


# ---- texts and jsons ----


def _text_of_picture(extension: str) -> str:
    """The extension of the text that a picture with dots in its name may have for itself; "" for any other member."""
    more, _, kind = extension.rpartition(".")
    return f"{more}.txt" if kind in PICTURES else ""


def _has_caption(member: Member | None) -> bool:
    """Whether a json has a text, or fails."""
    if member is None or member.data is None:
        return False
    try:
        meta = parse_json(member.data)
    except ValueError:
        return True
    return bool(meta.get("caption") or meta.get("captions"))


def parse_json(data: bytes) -> dict[str, Any]:
    """Parse the json of a sample; ValueError, with a reason, for one that is no object or nested too deep.

    NaN, Infinity and numbers beyond a double's range become None.
    """
    try:
        meta = json.loads(data.decode("utf-8-sig"), parse_constant=lambda _: None, parse_float=finite)
    except RecursionError as error:
        raise ValueError("json nested too deep") from error
    except ValueError as error:
        raise ValueError("json is broken") from error
    if not isinstance(meta, dict):
        raise ValueError("json is not an object")
    if not _is_shallow(meta, MAX_DEPTH):
        raise ValueError("json nested too deep")
    return meta


def finite(digits: str) -> float | None:
    """A number of a JSON; None for one beyond a double's range."""
    number = float(digits)  # 1e999 is JSON, and infinite here
    return number if math.isfinite(number) else None


def _is_shallow(value: object, levels: int) -> bool:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_is_shallow(child, levels - 1) for child in children)


def _text(data: bytes | None, meta: dict[str, Any]) -> str:
    """The sample's text: its txt, else the json's `caption`, else "". ValueError for a text that is not UTF-8."""
    caption = meta.get("caption")
    try:
        if data is not None:
            return data.decode("utf-8")
        text = caption if isinstance(caption, str) else ""
        text.encode("utf-8")  # json can spell half a character
        return text
    except UnicodeError as error:
        raise ValueError("text is not UTF-8") from error
