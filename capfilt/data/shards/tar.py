"""Reads a tar that may be hostile, member by member: its headers, and the data of those that are wanted.

`tarfile` parses the block of a header; going from one to the next is done here, since it ends silently at a damaged
header and at the first end of two tars in one file, and gives up a whole tar for one member that it cannot read.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from capfilt.data.shards.unpack import DamagedError, Readable, decompressed
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
    """A member of a tar, by its header."""

    name: str
    kind: Literal["file", "folder", "other"]
    size: int
    start: int
    """Where its data begins, in bytes of the decompressed tar."""
    problem: str = ""
    """Why its data cannot be read, though what follows it can."""


class Tar:
    """Iterates over the members of a tar. Tars that follow one another in a file are read as one."""

    def __init__(self, stream: Readable, seekable: bool = False):
        """`seekable`: whether to seek over data that is not wanted, where the tar is not compressed."""
        self._file = decompressed(stream, seekable)
        self._seeks = self._file.seekable()
        self._position = 0
        self._unread = 0
        """Bytes of the current member's data that are not read yet."""
        self._num_members = 0
        self._globals: dict[str, str] = {}

    def __iter__(self) -> Iterator[Entry]:
        """Give out each member; its data may be read before the next.

        Raises Cut where the tar ends early, is damaged, or is larger than any shard.
        """
        while True:
            deadline.check()
            self._skip(self._unread + -(self._position + self._unread) % _BLOCK)
            self._unread = 0
            block = self._next_header()
            if block is None:
                return
            entry = self._entry(block)
            self._num_members += 1
            if self._num_members > MAX_MEMBERS:
                raise Cut(f"more than {MAX_MEMBERS} members")
            self._unread = entry.size
            yield entry

    def read(self) -> bytes:
        """The data of the current member."""
        size, self._unread = self._unread, 0
        return self._read_exactly(size)

    def skip(self) -> None:
        """Skip the data of the current member, or raise Cut where it is not all there."""
        size, self._unread = self._unread, 0
        self._skip(size)

    def _next_header(self) -> bytes | None:
        """The next block that is not zeros, wherever it is: another tar may follow. None at the end of the tar."""
        zeros = 0
        while True:
            block = self._read(_BLOCK)
            if len(block) < _BLOCK:
                if zeros and not block.strip(b"\0"):
                    return None
                raise self._cut("" if self._num_members else "it is empty or too short")
            if block != _ZEROS:
                return block
            zeros += _BLOCK
            if zeros > MAX_ZEROS:
                raise self._cut(f"more than {MAX_ZEROS} zeros in a row")

    def _entry(self, block: bytes) -> Entry:
        """The member whose headers begin with this block."""
        fields, name, problem = dict(self._globals), "", ""
        for _ in range(MAX_EXTENDED):
            info = self._parse_header(block)
            if info.type not in (*_LONG, *_PAX):
                return self._make_entry(info, block, fields, name, problem)
            if info.size > MAX_HEADER:
                problem = f"too large a header ({info.size} bytes before it; {MAX_HEADER} are allowed)"
                self._skip(_padded(info.size))
            else:
                data = self._read_exactly(_padded(info.size))[: info.size]
                if info.type == tarfile.GNUTYPE_LONGNAME:
                    name = data.partition(b"\0")[0].decode("utf-8", "backslashreplace")
                elif info.type in _PAX and (records := _pax_records(data)) is None:
                    problem = "a damaged pax header"
                elif info.type in _PAX:
                    fields |= records or {}
                    if info.type == tarfile.XGLTYPE:
                        self._globals |= records or {}
            block = self._read_exactly(_BLOCK)
        raise self._cut("headers without end")

    def _make_entry(
        self, info: tarfile.TarInfo, block: bytes, fields: dict[str, str], name: str, problem: str
    ) -> Entry:
        """The member of a header, with what the extended headers before it say: pax `fields`, and a long `name`."""
        sparse = info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in fields)
        if info.type == tarfile.GNUTYPE_SPARSE:
            more = block[482]
            while more:  # its map goes on in blocks of its own
                deadline.check()
                more = self._read_exactly(_BLOCK)[504]
        name = fields.get("GNU.sparse.name") or fields.get("path") or name or info.name
        size = 0 if info.type in _EMPTY else self._size(fields.get("size", info.size))
        kind: Literal["file", "folder", "other"] = (
            "folder" if info.isdir() else "file" if info.type in tarfile.REGULAR_TYPES else "other"
        )
        return Entry(
            name.rstrip("/") if kind == "folder" else name,
            kind,
            size,
            self._position,
            problem or (_SPARSE if sparse else ""),
        )

    def _size(self, value: str | int) -> int:
        """A size that a header has; Cut where it is none, or too large."""
        try:
            size = int(value)
        except ValueError as error:
            raise self._cut(f"a size of {str(value)[:20]!r}") from error
        if not 0 <= size <= MAX_MEMBER:
            raise self._cut(f"a member of {size} bytes, {MAX_MEMBER} are allowed")
        return size

    def _parse_header(self, block: bytes) -> tarfile.TarInfo:
        if (common := _common_header(block)) is not None:
            return common
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
        except (tarfile.HeaderError, ValueError, OverflowError) as error:
            raise self._cut(f"there is no header of a tar ({error})") from error
        self._size(info.size)
        return info

    def _skip(self, size: int) -> None:
        if self._seeks and size > 0:
            self._file.seek(size - 1, io.SEEK_CUR)
            self._position += size - 1
            size = 1  # the last byte is read, since seeking does not fail behind the end
        while size > 0:
            deadline.check()
            size -= len(self._read_exactly(min(size, 2**20)))

    def _read_exactly(self, size: int) -> bytes:
        data = self._read(size)
        if len(data) < size:
            raise self._cut("")
        return data

    def _read(self, size: int) -> bytes:
        """So many bytes; fewer only at the end of the file."""
        try:
            data = self._file.read(size)
        except DamagedError as error:
            raise self._cut(str(error)) from error
        self._position += len(data)
        return data

    def _cut(self, why: str) -> Cut:
        if not self._num_members:
            return Cut(f"unreadable shard: {why or 'it ends in its first member'}")
        return Cut(f"shard cut at byte {self._position}" + (f": {why}" if why else ""))


def _common_header(block: bytes) -> tarfile.TarInfo | None:
    """Parse the header of a regular file as nearly all are, four times faster; None where it may be anything else."""
    name, size = block[:100].rstrip(b"\0"), block[124:136].rstrip(b" \0")
    checksum = block[148:156].rstrip(b" \0")
    if not (
        block[156:157] in (b"0", b"\0")
        and (block[257:265] == b"ustar  \0" or block[257:263] == b"ustar\0")
        and not block[345:500].strip(b"\0")  # a prefix of the name
        and name.isascii()
        and b"\0" not in name
        and not name.endswith(b"/")
        and size.isdigit()
        and checksum.isdigit()
        and not {b"8"[0], b"9"[0]} & {*size, *checksum}
        and sum(block) - sum(block[148:156]) + 8 * 32 == int(checksum, 8)
    ):
        return None
    info = tarfile.TarInfo(name.decode("ascii"))
    info.size = int(size, 8)
    return info


def _padded(size: int) -> int:
    return size + -size % _BLOCK


def _pax_records(data: bytes) -> dict[str, str] | None:
    """The `LENGTH KEY=VALUE` lines of a pax header; None where they are not such lines."""
    records, position = {}, 0
    while position < len(data) and data[position]:
        digits = data[position : position + 20].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        key, equals, value = data[position + len(digits) + 1 : position + length].partition(b"=")
        if not equals or not value.endswith(b"\n"):
            return None
        records[key.decode("utf-8", "backslashreplace")] = value[:-1].decode("utf-8", "backslashreplace")
        position += length
    return records


# ---- writing ----

_NAME, _SIZE, _SUM = slice(0, 100), slice(124, 136), slice(148, 156)
_SAME = bytearray(tarfile.TarInfo().tobuf(tarfile.GNU_FORMAT))
_SAME[_NAME], _SAME[_SIZE], _SAME[_SUM] = bytes(100), bytes(12), b" " * 8  # a sum is taken with spaces in its place
_SAME_SUM = sum(_SAME)


def tar_header(name: str, size: int) -> bytes:
    """The header of a member of this name and of so many bytes, as `tarfile` writes it for GNU tar, at a tenth of its
    time: one block, or three where the name has over 100 bytes.

    Half of the time of `select` went into `TarInfo.tobuf`, and all of it but name, size and sum is always the same.
    """
    encoded, octal = name.encode("utf-8", "surrogateescape"), b"%011o\0" % size
    if len(encoded) > 100 or len(octal) > 12:
        member = tarfile.TarInfo(name)
        member.size = size
        return member.tobuf(tarfile.GNU_FORMAT)
    header = bytearray(_SAME)
    header[: len(encoded)], header[_SIZE] = encoded, octal
    header[_SUM] = b"%06o\0 " % (_SAME_SUM + sum(encoded) + sum(octal))
    return bytes(header)
