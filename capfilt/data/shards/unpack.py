"""The bytes of a shard as they are packed: plain, gzip, bzip2 or xz, unpacked within bounds.

Python's own readers of these formats unpack whatever they are told to: ten megabytes become ten gigabytes. Here the
ratio is watched while unpacking, for what is read and for what is skipped alike.
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any, Protocol

from capfilt.runs import deadline

MAX_RATIO = 100
"""Unpacked bytes for each packed one. Shards of pictures unpack to 1.1 times their size, of jsons to 30 at most."""
FREE = 64 * 2**20
"""Unpacked bytes that any shard may have, whatever the ratio: what they cost is a tenth of a second."""
MAX_UNPACKED = 2**36
"""Unpacked bytes of a shard."""
MAX_DICTIONARY = 256 * 2**20
"""Memory that an xz may ask for."""
_PIECE = 2**16
_BUFFER = 2**18

_GZIP, _BZIP2, _XZ, _LZMA = b"\x1f\x8b\x08", b"BZh", b"\xfd7zXZ\0", b"\x5d\0\0\x80"
_KINDS: tuple[tuple[bytes, Callable[[], Any]], ...] = (
    (_GZIP, lambda: zlib.decompressobj(31)),
    (_BZIP2, bz2.BZ2Decompressor),
    (_XZ, lambda: lzma.LZMADecompressor(memlimit=MAX_DICTIONARY)),
    (_LZMA, lambda: lzma.LZMADecompressor(memlimit=MAX_DICTIONARY)),
)


class DamagedError(Exception):
    """Packed bytes that are damaged, or that unpack to more than is allowed."""


class Readable(Protocol):
    """As much of a file as a tar is read by."""

    def read(self, size: int = -1, /) -> bytes: ...


def unpacked(stream: Readable, seekable: bool = False) -> io.BufferedReader:
    """Open the unpacked bytes of `stream`, from where it stands.

    With `seekable` a plain stream is one too: what is skipped is then not read.

    Raises (while it is read):
        DamagedError: the packed bytes are damaged, end too early, or unpack to more than is allowed.
    """
    head = stream.read(_PIECE)
    if seekable and not _packed(head):
        stream.seek(0)  # type: ignore[attr-defined]
        return io.BufferedReader(_Plain(b"", stream, seekable=True), _BUFFER)
    kind = _packed(head)
    return io.BufferedReader(_Unpacking(head, stream, *kind) if kind else _Plain(head, stream), _BUFFER)


def _packed(head: bytes) -> tuple[bytes, Callable[[], Any]] | None:
    return next((kind for kind in _KINDS if head.startswith(kind[0])), None)


class _Plain(io.RawIOBase):
    """A stream as raw bytes, those that were read of it already first."""

    def __init__(self, head: bytes, stream: Any, seekable: bool = False):
        self._head, self._stream, self._seekable = head, stream, seekable

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._seekable

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._stream.seek(offset, whence))

    def tell(self) -> int:
        return int(self._stream.tell())

    def readinto(self, buffer: Any) -> int:
        data = self._head[: len(buffer)] if self._head else self._stream.read(len(buffer))
        self._head = self._head[len(data) :]
        buffer[: len(data)] = data
        return len(data)


class _Unpacking(io.RawIOBase):
    """Unpacks packed streams that follow one another (`cat a.gz b.gz`), until the last has ended."""

    def __init__(self, head: bytes, stream: Readable, magic: bytes, make: Callable[[], Any]):
        self._waiting, self._stream, self._magic, self._make = head, stream, magic, make
        self._now = make()
        self._packed, self._given = len(head), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""
        while not data:
            deadline.check()
            if self._now.eof and not self._next():
                return 0
            data = self._piece(len(buffer))
        self._given += len(data)
        if self._given > MAX_UNPACKED:
            raise DamagedError(f"more than {MAX_UNPACKED // 2**30} GiB when unpacked")
        if self._given > FREE and self._given > MAX_RATIO * self._packed:
            raise DamagedError(
                f"a bomb: {self._packed} packed bytes unpack to {self._given} and more, {MAX_RATIO} times are allowed"
            )
        buffer[: len(data)] = data
        return len(data)

    def _piece(self, size: int) -> bytes:
        """At most `size` unpacked bytes; b"" where there are none yet."""
        try:
            data: bytes = self._now.decompress(self._waiting, size)
        except (zlib.error, lzma.LZMAError, OSError, ValueError) as error:
            raise DamagedError(str(error)) from error
        tail = self._now.unconsumed_tail if self._magic == _GZIP else b""  # the others keep it themselves
        self._waiting = self._now.unused_data if self._now.eof else tail
        if not data and not self._now.eof and not self._waiting:
            self._waiting = self._read()
            if not self._waiting:
                raise DamagedError("it ends in the middle")
        return data

    def _read(self) -> bytes:
        data = self._stream.read(_PIECE)
        self._packed += len(data)
        return data

    def _next(self) -> bool:
        """Begin the packed stream that follows, if one does; zeros between and behind are padding."""
        while not (left := self._waiting.lstrip(b"\0")):
            deadline.check()
            if not (left := self._read()):
                return False
            self._waiting = left
        while len(left) < len(self._magic) and (more := self._read()):
            left += more
        if not left.startswith(self._magic):
            raise DamagedError("what follows its end is not packed as it is")
        self._now, self._waiting = self._make(), left
        return True
