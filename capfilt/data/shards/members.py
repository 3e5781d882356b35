"""The members of a shard, read under limits and gathered by the samples that they belong to.

A name belongs to a key as in webdataset: what stands before the first dot of its last segment. Only where that gives no
picture with a text, dots are looked at again (`gather.py`).
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from capfilt.data.sample import Fault, Sample
from capfilt.data.shards.tar import Entry, Tar
from capfilt.data.shards.unpack import Readable

IMAGES = ("jpg", "jpeg", "png", "webp")
UNREAD = ("avif", "bmp", "gif", "heic", "heif", "jfif", "jp2", "jxl", "svg", "tif", "tiff")
"""Pictures that are named, not read: a shard's are carried as they came, and loaders expect IMAGES."""
PICTURES = frozenset((*IMAGES, *UNREAD))
MAX_IMAGE = 256 * 2**20
MAX_TEXT = 16 * 2**20
MAX_KEY = 1024
MAX_DEPTH = 100
"""Nesting of a json; far from Python's own limit, so that what was read can always be written."""

USED, CARRIED = "used", "carried"
OF_A_FAULT = "of a sample that failed"

ESSENTIAL = (*IMAGES, "txt", "json", "")
"""What a sample is read from; a part that cannot be read is a fault of the sample here, and passed over elsewhere."""

# webdataset's own: members below `__name__/` are metadata of the shard, not samples.
_METADATA = re.compile(r"__[^/]*__/")
# What hides in a name, or turns the order of what is read: not joiners, marks and spaces, which names of people have.
_UNSEEN = re.compile("[\\u202a-\\u202e\\u2066-\\u2069]")
_UNNAMED = {"Cc", "Cs", "Zl", "Zp"}


class Members(Counter[str]):
    """What became of the members of a shard: how many came "in", were "used" by samples, "carried" beside them, or were
    passed over, by the reason."""


@dataclass(frozen=True, slots=True)
class Member:
    """One file that may be part of a sample; its data where that was asked for, or a `problem` in its place."""

    number: int
    """Its place in the tar."""
    key: str
    extension: str
    start: int
    """Where its data lies in the unpacked tar."""
    size: int
    data: bytes | None = None
    problem: str = ""

    @property
    def name(self) -> str:
        """As in the tar, but for the case behind the last dot."""
        return f"{self.key}.{self.extension}"

    @property
    def stem(self) -> str:
        """Its name up to the last dot."""
        return self.name.rpartition(".")[0] if self.dotted else self.key

    @property
    def kind(self) -> str:
        """Its name behind the last dot."""
        return self.extension.rpartition(".")[2]

    @property
    def dotted(self) -> bool:
        """Whether webdataset takes more than what stands behind the last dot for its extension."""
        return "." in self.extension

    @property
    def picture(self) -> bool:
        """Whether it is an image, of a kind that is read or not."""
        return self.kind in PICTURES

    @property
    def end(self) -> int:
        return self.start + self.size

    def with_data(self, data: bytes | None) -> Member:
        """The same member, read or unread."""
        return Member(*_fields(self), data, self.problem)


@dataclass
class Group:
    """The members of one key."""

    key: str
    parts: dict[str, Member] = field(default_factory=dict)
    """By extension."""
    problem: str = ""
    """Why they are no sample, though each can be read."""

    def takes(self, member: Member) -> bool:
        """Whether `member` belongs here: an extension met twice begins the key anew."""
        return member.key == self.key and member.extension.lower() not in self.parts

    def add(self, member: Member) -> None:
        self.parts[member.extension.lower()] = member

    @property
    def complete(self) -> bool:
        """Whether nothing that img2dataset writes for a key is missing."""
        return {"txt", "json"} < self.parts.keys()

    @property
    def settled(self) -> bool:
        """Whether these are a sample, or a fault, whatever else the shard may hold."""
        if key_problem(self.key, set()) or any(self.parts[name].problem for name in ESSENTIAL if name in self.parts):
            return True
        if self.parts.keys().isdisjoint(PICTURES):
            return False
        if any("." in name and _own_text(name) in self.parts for name in self.parts):
            return False
        return "txt" in self.parts or _has_text(self.parts.get("json"))

    def outcome(self, seen: set[str], members: Members) -> Sample | Fault:
        """Turn the group into its Sample, or the first Fault found; remembers the key in `seen`, and counts."""
        problem = key_problem(self.key, seen) or self._problem()
        if not self.problem:
            seen.add(written(self.key))
        found: Sample | Fault = Fault(self.key, problem)
        if not problem:
            try:
                found = self._sample()
            except ValueError as error:
                found = Fault(self.key, str(error))
        if isinstance(found, Fault):
            members[OF_A_FAULT] += len(self.parts)
            return found
        for name, member in self.parts.items():
            members[USED if name in ESSENTIAL else class_of(member.problem) if member.problem else CARRIED] += 1
        return found

    def _problem(self) -> str:
        said = next((m.problem for name, m in self.parts.items() if name in ESSENTIAL and m.problem), self.problem)
        images = [name for name in IMAGES if name in self.parts]
        if said or len(images) == 1:
            return said
        unread = [name for name in UNREAD if name in self.parts]
        if unread and not images:
            return f"{unread[0]} is not read ({', '.join(IMAGES)} are)"
        return "more than one image" if images else "no image"

    def _sample(self) -> Sample:
        image = next(name for name in IMAGES if name in self.parts)
        meta = _parse(self._data("json", b"{}"))
        text = _text(self._data("txt") if "txt" in self.parts else None, meta)
        extras = {name: m.data for name, m in self.parts.items() if name not in ESSENTIAL and m.data is not None}
        return Sample(self.key, self._data(image), image, text, meta, extras)

    def _data(self, name: str, absent: bytes = b"") -> bytes:
        if name not in self.parts:
            return absent
        data = self.parts[name].data
        assert data is not None, "images, texts and jsons are always read"
        return data


def key_problem(key: str, seen: set[str]) -> str:
    """Why `key` cannot name a sample, or "": what `shards.write` refuses, `shards.read` never yields."""
    segments = key.split("/")
    if len(key) > MAX_KEY:
        return f"unsafe key (longer than {MAX_KEY} characters)"
    if not key.isprintable() and _hides(key):
        return "unsafe key (control characters, or such as turn the direction of writing)"
    if not all(segments) or {".", ".."} & set(segments) or _METADATA.match(key):
        return "unsafe key (absolute, '..', empty or metadata name)"
    return "duplicate key" if written(key) in seen else ""


def _hides(key: str) -> bool:
    return bool(_UNSEEN.search(key)) or any(unicodedata.category(letter) in _UNNAMED for letter in key)


def written(key: str) -> str:
    """The name of a key in a tar that other readers of tars cut where we do: without dots in its last segment."""
    folder, slash, base = key.rpartition("/")
    if "." not in base:
        return key
    return f"{folder}{slash}{base.replace('%', '%25').replace('.', '%2E')}"


class MemberReader:
    """Streams the members of a tar that may be part of a sample, and counts all others."""

    def __init__(self, stream: Readable, members: Members, wanted: Callable[[Member], bool], seekable: bool = False):
        """`wanted` says of which members the data is read."""
        self._tar, self._members, self._wanted = Tar(stream, seekable), members, wanted
        self.num = 0
        """Headers that were read."""
        self.reading: Member | None = None
        """Whose data was being read when the tar was found to be cut."""

    def __iter__(self) -> Iterator[Member]:
        """Raises Cut where the tar cannot be read further, and OSError where the stream failed."""
        for entry in self._tar:
            self._members["in"] += 1
            member = member_of(entry, self.num)
            self.num += 1
            if isinstance(member, str):
                self._members[member] += 1
                continue
            self.reading = member
            if not member.problem and self._wanted(member):
                member = member.with_data(self._tar.read())
            else:
                self._tar.pass_over()
            self.reading = None
            yield member


def essential(member: Member) -> bool:
    """Whether an image, a text or a json, of whichever key."""
    return member.kind in ESSENTIAL


def member_of(entry: Entry, number: int) -> Member | str:
    """The part of a sample that a member of a tar is, its data unread; or why it is none."""
    # `tar -C folder .` writes a leading ./, and the parquet beside the tar knows the key without it.
    path = entry.name.removeprefix("./")
    base = path.rpartition("/")[2]
    if entry.kind == "folder":
        return "a folder"
    if _METADATA.match(path):
        return "metadata of the shard"
    if base.startswith("._") or path.startswith("__MACOSX/"):
        return "AppleDouble"
    key, extension = _split(path)
    if len(extension) > MAX_KEY:
        return "too long a name"
    if entry.problem or entry.kind != "file":
        problem = entry.problem or "not a regular file (link or device)"
        return Member(number, key or path, extension, entry.start, entry.size, problem=problem)
    if not key:
        return "a name without key or extension"
    member = Member(number, key, extension, entry.start, entry.size)
    limit = MAX_TEXT if member.kind in ("txt", "json") else MAX_IMAGE
    if entry.size <= limit:
        return member
    what = member.kind if member.kind in (*PICTURES, "txt", "json") else "a member"
    return Member(*_fields(member), problem=f"{what} larger than {limit // 2**20} MiB")


def _fields(member: Member) -> tuple[int, str, str, int, int]:
    return member.number, member.key, member.extension, member.start, member.size


def _split(path: str) -> tuple[str, str]:
    """Split a member's path into key and extension at the first dot of its last segment; ("", "") where there
    is none."""
    folder, slash, base = path.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot:
        return "", ""
    more, dot, last = extension.rpartition(".")
    return f"{folder}{slash}{stem}", f"{more}{dot}{last.lower()}"


def class_of(problem: str) -> str:
    """A problem as it is counted: without sizes and places."""
    return problem.partition(" (")[0]


def _own_text(extension: str) -> str:
    """The text that a picture with dots in its name has, if it has one of its own; "" where this is no such picture."""
    more, _, kind = extension.rpartition(".")
    return f"{more}.txt" if kind in PICTURES else ""


def _has_text(member: Member | None) -> bool:
    """Whether a json says a text, or is a fault."""
    if member is None or member.data is None:
        return False
    try:
        meta = _parse(member.data)
    except ValueError:
        return True
    return bool(meta.get("caption") or meta.get("captions"))


def _parse(data: bytes) -> dict[str, Any]:
    try:
        meta = json.loads(data.decode("utf-8-sig"), parse_constant=_no_number, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("json nested too deep") from error
    except ValueError as error:
        raise ValueError("json is broken") from error
    if not isinstance(meta, dict):
        raise ValueError("json is not an object")
    if not _shallow(meta, MAX_DEPTH):
        raise ValueError("json nested too deep")
    return meta


def _no_number(name: str) -> None:
    """NaN and Infinity are no JSON, though Python writes them: null takes their place."""


def _finite(digits: str) -> float | None:
    number = float(digits)  # 1e999 is JSON, and infinite here
    return number if math.isfinite(number) else None


def _shallow(value: object, levels: int) -> bool:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_shallow(child, levels - 1) for child in children)


def _text(data: bytes | None, meta: dict[str, Any]) -> str:
    """The sample's text: its txt, else the json's `caption`, else none."""
    caption = meta.get("caption")
    try:
        if data is not None:
            return data.decode("utf-8")
        text = caption if isinstance(caption, str) else ""
        text.encode("utf-8")  # json can spell half a character
        return text
    except UnicodeError as error:
        raise ValueError("text is not UTF-8") from error
