"""The bytes of a shard, decompressed within bounds where they are gzip, bzip2, xz or lzma.

Python's own readers of these formats decompress without a limit: ten megabytes become ten gigabytes. Here the ratio is
watched while decompressing, for what is read and for what is skipped alike.
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
"""Decompressed bytes for each compressed one. Shards of pictures have 1.1, of jsons 30 at most."""
FREE_BYTES = 64 * 2**20
"""Decompressed bytes that any shard may have, whatever the ratio: they cost a tenth of a second."""
MAX_BYTES = 2**36
"""Decompressed bytes of a shard."""
MAX_DICTIONARY = 256 * 2**20
"""Bytes of memory that an xz may ask for."""
_READ_BYTES = 2**16
_BUFFER_BYTES = 2**18

_GZIP = b"\x1f\x8b\x08"
_FORMATS: dict[bytes, Callable[[], Any]] = {
    _GZIP: lambda: zlib.decompressobj(31),
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ\0": lambda: lzma.LZMADecompressor(memlimit=MAX_DICTIONARY),
    b"\x5d\0\0\x80": lambda: lzma.LZMADecompressor(memlimit=MAX_DICTIONARY),  # lzma
}
"""What decompresses a stream, by the bytes that every stream of its format begins with."""


class DamagedError(Exception):
    """Compressed bytes that are damaged, or that decompress to more than is allowed."""


class Readable(Protocol):
    """The one method of a file by which a tar is read."""

    def read(self, size: int = -1, /) -> bytes: ...


def decompressed(stream: Readable, seekable: bool = False) -> io.BufferedReader:
    """Open the decompressed bytes of `stream`, from its position on.

    `seekable`: whether an uncompressed stream may be sought in, so that what is skipped is not read.

    Raises (while it is read):
        DamagedError: the bytes are damaged, end too early, or decompress to more than is allowed.
    """
    head = stream.read(_READ_BYTES)
    magic = next((magic for magic in _FORMATS if head.startswith(magic)), None)
    if magic is not None:
        return io.BufferedReader(_Decompressed(head, stream, magic), _BUFFER_BYTES)
    if seekable:
        stream.seek(0)  # type: ignore[attr-defined]
        head = b""
    return io.BufferedReader(_Uncompressed(head, stream, seekable), _BUFFER_BYTES)


class _Uncompressed(io.RawIOBase):
    """A stream as it is; `head` was read of it already."""

    def __init__(self, head: bytes, stream: Any, seekable: bool):
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


class _Decompressed(io.RawIOBase):
    """Decompresses streams of one format that follow one another (`cat a.gz b.gz`), until the last has ended."""

    def __init__(self, head: bytes, stream: Readable, magic: bytes):
        self._input, self._stream, self._magic = head, stream, magic
        self._decompressor = _FORMATS[magic]()
        self._num_read, self._num_given = len(head), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""
        while not data:
            deadline.check()
            if self._decompressor.eof and not self._begin_next():
                return 0
            data = self._decompress(len(buffer))
        self._num_given += len(data)
        if self._num_given > MAX_BYTES:
            raise DamagedError(f"more than {MAX_BYTES // 2**30} GiB when unpacked")
        if self._num_given > FREE_BYTES and self._num_given > MAX_RATIO * self._num_read:
            raise DamagedError(
                f"a bomb: {self._num_read} packed bytes unpack to {self._num_given} and more, {MAX_RATIO} times are"
                " allowed"
            )
        buffer[: len(data)] = data
        return len(data)

    def _decompress(self, size: int) -> bytes:
        """At most `size` decompressed bytes; b"" where more input is needed first."""
        try:
            data: bytes = self._decompressor.decompress(self._input, size)
        except (zlib.error, lzma.LZMAError, OSError, ValueError) as error:
            raise DamagedError(str(error)) from error
        # zlib hands back the input that it has not used yet; the others keep it.
        unused = self._decompressor.unconsumed_tail if self._magic == _GZIP else b""
        self._input = self._decompressor.unused_data if self._decompressor.eof else unused
        if not data and not self._decompressor.eof and not self._input:
            self._input = self._read()
            if not self._input:
                raise DamagedError("it ends in the middle")
        return data

    def _read(self) -> bytes:
        data = self._stream.read(_READ_BYTES)
        self._num_read += len(data)
        return data

    def _begin_next(self) -> bool:
        """Begin the compressed stream that follows, if one does; zeros between and behind are padding."""
        while not (rest := self._input.lstrip(b"\0")):
            deadline.check()
            if not (rest := self._read()):
                return False
            self._input = rest
        while len(rest) < len(self._magic) and (more := self._read()):
            rest += more
        if not rest.startswith(self._magic):
            raise DamagedError("what follows its end is not packed as it is")
        self._decompressor, self._input = _FORMATS[self._magic](), rest
        return True
