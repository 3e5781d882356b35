"""The inside of a tar that may be hostile: members under limits, grouped by webdataset's key rule.

`tarfile` ends quietly at a damaged header, reads name headers of any size into memory, and answers damage
with half a dozen exception types; here each of these is a `Cut`, with the byte where sense ended.
"""

from __future__ import annotations

import json
import lzma
import math
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any, NoReturn, Protocol, cast

from capfilt.data.sample import Fault, Sample

IMAGES = ("jpg", "jpeg", "png", "webp")
MAX_IMAGE = 256 * 2**20
MAX_TEXT = 16 * 2**20
MAX_HEADER = 2**20
"""Bytes of a long-name or pax header; a real one has a few hundred."""
MAX_MEMBER = 2**34
"""Bytes of a member that is passed over unread; a hole of a terabyte costs its writer nothing, and its reader hours."""
MAX_MEMBERS = 1_000_000
"""Members of a shard; a real one has tens of thousands, and empty ones compress to nothing."""
MAX_KEY = 1024
MAX_DEPTH = 100
"""Nesting of a json; far from Python's own limit, so that what was read can always be written."""

_EXTENDED = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
)  # fmt: skip
# webdataset's own: members below `__name__/` are metadata of the shard, not samples.
_METADATA = re.compile(r"__[^/]*__/")
# What tarfile and its decompressors raise on damaged bytes; an OSError would be a failing disk.
_DAMAGE = (
    tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, ValueError, TypeError, LookupError,
    OverflowError, RecursionError,
)  # fmt: skip


class Cut(Exception):
    """The shard cannot be read further: why, and the key whose member was being read, when known."""

    def __init__(self, reason: str, key: str | None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.key = key


@dataclass(frozen=True)
class Member:
    """One file of a sample, read; or a `problem` in its place."""

    key: str
    extension: str
    data: bytes = b""
    problem: str = ""


@dataclass
class Group:
    """The members of one key, until the next key begins."""

    key: str
    parts: dict[str, bytes] = field(default_factory=dict)
    problem: str = ""

    def takes(self, member: Member) -> bool:
        """Whether `member` belongs here: an extension met twice begins the key anew."""
        return member.key == self.key and member.extension not in self.parts

    def add(self, member: Member) -> None:
        self.parts[member.extension] = member.data
        self.problem = self.problem or member.problem

    @property
    def complete(self) -> bool:
        """Whether nothing that img2dataset writes for a key is missing."""
        return {"txt", "json"} < self.parts.keys()

    def outcome(self, seen: set[str]) -> Sample | Fault:
        """Turn the group into its Sample, or the first Fault found; remembers the key in `seen`."""
        problem = key_problem(self.key, seen) or self.problem
        seen.add(self.key)
        images = [extension for extension in IMAGES if extension in self.parts]
        if not problem and len(images) != 1:
            problem = "more than one image" if images else "no image"
        if problem:
            return Fault(self.key, problem)
        try:
            meta = _parse(self.parts.get("json", b"{}"))
            text = _text(self.parts.get("txt"), meta)
        except ValueError as error:
            return Fault(self.key, str(error))
        return Sample(self.key, self.parts[images[0]], images[0], text, meta)


def key_problem(key: str, seen: set[str]) -> str:
    """Why `key` cannot name a sample, or "": what `shards.write` refuses, `shards.read` never yields."""
    segments = key.split("/")
    if len(key) > MAX_KEY:
        return f"unsafe key (longer than {MAX_KEY} characters)"
    if not key.isprintable():
        return "unsafe key (control or invisible characters)"
    if "." in segments[-1] or not all(segments) or {".", ".."} & set(segments) or _METADATA.match(key):
        return "unsafe key (absolute, '..', empty, dotted or metadata name)"
    return "duplicate key" if key in seen else ""


class Readable(Protocol):
    """As much of a file as a tar is read by."""

    def read(self, size: int = -1, /) -> bytes: ...


def members(stream: Readable) -> Iterator[Member]:
    """Stream the images, texts and jsons of a tar (plain, gzip, bzip2 or xz), each read under its limit.

    Folders, shard metadata and files that are no part of a sample are passed over without being read.

    Raises:
        Cut: the tar ends early or its bytes are damaged.
        OSError: `stream` itself failed.
    """
    tar: tarfile.TarFile | None = None
    reading: str | None = None
    num = 0
    try:
        tar = _open(stream)
        while header := tar.next():
            num += 1
            if num > MAX_MEMBERS:
                raise Cut(f"more than {MAX_MEMBERS} members", None)
            # tarfile remembers every header, and a shard may have a million.
            tar.members.clear()  # type: ignore[attr-defined]
            key, extension = _split(header.name)
            reading = key or None
            member = _member(tar, header, key, extension)
            if member is not None:
                yield member
            reading = None
    except _DAMAGE as error:
        if tar is None or tar.fileobj is None:
            raise Cut(f"unreadable shard: {error}", None) from error
        raise Cut(f"shard cut at byte {tar.fileobj.tell()}", reading) from error


class _Header(tarfile.TarInfo):
    """A tar header that refuses what tarfile forgives: early ends, huge name headers, sparse files."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _Header:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise  # zero blocks: the regular end, and the only one
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.size < 0 or (self.type in _EXTENDED and self.size > MAX_HEADER):
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        if self.type == tarfile.GNUTYPE_SPARSE:
            self._refuse_sparse()
        found: tarfile.TarInfo = super()._proc_member(tar)  # type: ignore[misc]
        if not 0 <= found.size <= MAX_MEMBER:
            raise tarfile.ReadError(f"a member of {found.size} bytes")
        return found

    def _refuse_sparse(self, *_: Any) -> NoReturn:
        raise tarfile.ReadError("a sparse member")

    # The three pax spellings of a sparse map; a map can claim any length.
    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_sparse


def _open(stream: Readable) -> tarfile.TarFile:
    file = cast(IO[bytes], stream)
    return tarfile.open(fileobj=file, mode="r|*", tarinfo=_Header, encoding="utf-8", errors="backslashreplace")


def _member(tar: tarfile.TarFile, header: tarfile.TarInfo, key: str, extension: str) -> Member | None:
    if header.isdir() or _METADATA.match(header.name):
        return None
    if not header.isreg():
        return Member(key or header.name, extension, problem="not a regular file (link or device)")
    if not key or extension not in (*IMAGES, "txt", "json"):
        return None
    limit = MAX_IMAGE if extension in IMAGES else MAX_TEXT
    if header.size > limit:
        return Member(key, extension, problem=f"{extension} larger than {limit // 2**20} MiB")
    file = tar.extractfile(header)
    assert file is not None, "a regular member always opens"
    return Member(key, extension, file.read())


def _split(path: str) -> tuple[str, str]:
    """Split a member's path into key and extension at the first dot of its last segment; ("", "") where there
    is none.

    A leading `./` goes: `tar -C folder .` writes it, and the parquet beside the tar knows the key without it.
    """
    folder, slash, base = path.removeprefix("./").rpartition("/")
    stem, dot, extension = base.partition(".")
    return (f"{folder}{slash}{stem}", extension.lower()) if stem and dot else ("", "")


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
