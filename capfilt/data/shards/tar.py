"""The members of a tar that may be hostile: headers, one after another, and what each has to say.

`tarfile` reads the block of a header; walking from one to the next is done here, since it ends quietly at a damaged
header and at the first end of two tars in one file, and gives up a whole tar for one member that it cannot read.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from capfilt.data.shards.unpack import DamagedError, Readable, unpacked
from capfilt.runs import deadline

MAX_HEADER = 2**20
"""Bytes of a long-name or pax header; a real one has a few hundred."""
MAX_MEMBER = 2**34
"""Bytes of a member; a hole of a terabyte costs its writer nothing, and its reader hours."""
MAX_MEMBERS = 1_000_000
"""Members of a shard; a real one has tens of thousands, and empty ones compress to nothing."""
MAX_ZEROS = 2**26
"""Bytes of zeros in a row between members; tar pads to ten thousand."""
MAX_EXTENDED = 100
"""Name and pax headers before one member; a real one has two."""
_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_LONG = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
_EMPTY = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)
"""Types without data, whatever their header says of a size."""
_SPARSE = "a sparse file (write it whole: tar without --sparse)"


class Cut(Exception):
    """The shard cannot be read further, and why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Entry:
    """What the header of a member says."""

    name: str
    kind: Literal["file", "folder", "other"]
    size: int
    start: int
    """Where its data begins in the unpacked tar."""
    problem: str = ""
    """Why its data cannot be read, though what follows it can."""


class Tar:
    """Walks a tar, from header to header. Tars that follow one another in a file are read as one."""

    def __init__(self, stream: Readable, seekable: bool = False):
        """With `seekable`, data that is not asked for is not read either, where the tar is not packed."""
        self._file = unpacked(stream, seekable)
        self._jumps = self._file.seekable()
        self._at = 0
        self._left = 0  # of the member's data
        self._num = 0
        self._globals: dict[str, str] = {}

    def __iter__(self) -> Iterator[Entry]:
        """Raises Cut where the tar ends early, is damaged, or is larger than any shard."""
        while True:
            deadline.check()
            self._skip(self._left + -(self._at + self._left) % _BLOCK)
            self._left = 0
            block = self._header()
            if block is None:
                return
            entry = self._entry(block)
            self._num += 1
            if self._num > MAX_MEMBERS:
                raise Cut(f"more than {MAX_MEMBERS} members")
            self._left = entry.size
            yield entry

    def read(self) -> bytes:
        """The data of the member whose header came last."""
        size, self._left = self._left, 0
        return self._exactly(size)

    def pass_over(self) -> None:
        """Go behind that data without keeping it."""
        size, self._left = self._left, 0
        self._skip(size)

    def _header(self) -> bytes | None:
        """The next block that is not zeros, wherever it is: another tar may follow. None at an end that is one."""
        zeros = 0
        while True:
            block = self._some(_BLOCK)
            if len(block) < _BLOCK:
                if zeros and not block.strip(b"\0"):
                    return None
                raise self._cut("" if self._num else "it is empty or too short")
            if block != _ZEROS:
                return block
            zeros += _BLOCK
            if zeros > MAX_ZEROS:
                raise self._cut(f"more than {MAX_ZEROS} zeros in a row")

    def _entry(self, block: bytes) -> Entry:
        """The member whose headers begin with this block."""
        fields, name, problem = dict(self._globals), "", ""
        for _ in range(MAX_EXTENDED):
            info = self._parsed(block)
            if info.type not in (*_LONG, *_PAX):
                return self._made(info, block, fields, name, problem)
            if info.size > MAX_HEADER:
                problem = f"too large a header ({info.size} bytes before it; {MAX_HEADER} are allowed)"
                self._skip(_padded(info.size))
            else:
                data = self._exactly(_padded(info.size))[: info.size]
                if info.type == tarfile.GNUTYPE_LONGNAME:
                    name = data.partition(b"\0")[0].decode("utf-8", "backslashreplace")
                elif info.type in _PAX and (found := _records(data)) is None:
                    problem = "a damaged pax header"
                elif info.type in _PAX:
                    fields |= found or {}
                    if info.type == tarfile.XGLTYPE:
                        self._globals |= found or {}
            block = self._exactly(_BLOCK)
        raise self._cut("headers without end")

    def _made(self, info: tarfile.TarInfo, block: bytes, fields: dict[str, str], name: str, problem: str) -> Entry:
        sparse = info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in fields)
        if info.type == tarfile.GNUTYPE_SPARSE:
            more = block[482]
            while more:  # its map goes on in blocks of its own
                deadline.check()
                more = self._exactly(_BLOCK)[504]
        name = fields.get("GNU.sparse.name") or fields.get("path") or name or info.name
        size = 0 if info.type in _EMPTY else self._size(fields.get("size", info.size))
        kind: Literal["file", "folder", "other"] = (
            "folder" if info.isdir() else "file" if info.type in tarfile.REGULAR_TYPES else "other"
        )
        return Entry(name.rstrip("/") if kind == "folder" else name, kind, size, self._at, problem or _SPARSE * sparse)

    def _size(self, said: str | int) -> int:
        try:
            size = int(said)
        except ValueError as error:
            raise self._cut(f"a size of {str(said)[:20]!r}") from error
        if not 0 <= size <= MAX_MEMBER:
            raise self._cut(f"a member of {size} bytes, {MAX_MEMBER} are allowed")
        return size

    def _parsed(self, block: bytes) -> tarfile.TarInfo:
        if (ordinary := _ordinary(block)) is not None:
            return ordinary
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
        except (tarfile.HeaderError, ValueError, OverflowError) as error:
            raise self._cut(f"there is no header of a tar ({error})") from error
        self._size(info.size)
        return info

    def _skip(self, size: int) -> None:
        if self._jumps and size > 0:
            self._file.seek(size - 1, io.SEEK_CUR)
            self._at += size - 1
            size = 1  # read, since one may jump behind the end
        while size > 0:
            deadline.check()
            size -= len(self._exactly(min(size, 2**20)))

    def _exactly(self, size: int) -> bytes:
        data = self._some(size)
        if len(data) < size:
            raise self._cut("")
        return data

    def _some(self, size: int) -> bytes:
        """So many bytes; fewer at the end of the file only."""
        try:
            data = self._file.read(size)
        except DamagedError as error:
            raise self._cut(str(error)) from error
        self._at += len(data)
        return data

    def _cut(self, why: str) -> Cut:
        if not self._num:
            return Cut(f"unreadable shard: {why or 'it ends in its first member'}")
        return Cut(f"shard cut at byte {self._at}" + (f": {why}" if why else ""))


def _ordinary(block: bytes) -> tarfile.TarInfo | None:
    """The header of a file as nearly all are, in a quarter of the time; None where it may be anything else."""
    name, size = block[:100].rstrip(b"\0"), block[124:136].rstrip(b" \0")
    said = block[148:156].rstrip(b" \0")
    if not (
        block[156:157] in (b"0", b"\0")
        and (block[257:265] == b"ustar  \0" or block[257:263] == b"ustar\0")
        and not block[345:500].strip(b"\0")  # a prefix of the name
        and name.isascii()
        and b"\0" not in name
        and not name.endswith(b"/")
        and size.isdigit()
        and said.isdigit()
        and not {b"8"[0], b"9"[0]} & {*size, *said}
        and sum(block) - sum(block[148:156]) + 8 * 32 == int(said, 8)
    ):
        return None
    info = tarfile.TarInfo(name.decode("ascii"))
    info.size = int(size, 8)
    return info


def _padded(size: int) -> int:
    return size + -size % _BLOCK


def _records(data: bytes) -> dict[str, str] | None:
    """The `LENGTH KEY=VALUE` lines of a pax header; None where they are not such lines."""
    found, at = {}, 0
    while at < len(data) and data[at]:
        digits = data[at : at + 20].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        key, equals, value = data[at + len(digits) + 1 : at + length].partition(b"=")
        if not equals or not value.endswith(b"\n"):
            return None
        found[key.decode("utf-8", "backslashreplace")] = value[:-1].decode("utf-8", "backslashreplace")
        at += length
    return found
