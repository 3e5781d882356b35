"""JSON that is larger than memory: the elements of its arrays, one at a time, and the lines of JSON lines.

Each element is parsed as a whole by the decoder of the standard library, so memory holds one element and the part of
the file that was read ahead: 2 MiB, unless an element is longer.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec

from capfilt.data.shards.groups import finite
from capfilt.errors import DataError, ListError
from capfilt.printable import printable

CHUNK = 2**20
"""Characters that are read at a time."""
MAX_ELEMENT = 2**24
"""Characters of one element, or bytes of a line."""
MAX_LEVELS = 2
"""How deep arrays are looked for, as in `{"data": {"dialogs": [...]}}`."""


@contextmanager
def opened(url: str) -> Iterator[io.BufferedReader]:
    """Open a file of this machine or of a store. ListError where it is not there, DataError where reading it fails."""
    try:
        with fsspec.open(url, "rb") as file:
            yield file
    except FileNotFoundError:
        raise ListError(f"there is no file {url}: check the path.") from None
    except (OSError, ImportError) as error:
        raise DataError(f"{url} cannot be read: {error}") from error


def elements(url: str) -> Iterator[tuple[str, Any]]:
    """The elements of all arrays of a JSON file, each with the keys that lead to its array.

    `{"data": {"dialogs": [a, b]}}` gives ("data.dialogs", a), ("data.dialogs", b); a list alone gives ("", a), ...
    NaN, Infinity and numbers beyond a double's range become None.

    Raises:
        DataError: the file is no JSON in UTF-8; what came before the fault was given.
    """
    with opened(url) as file:
        window = _Window(io.TextIOWrapper(file, "utf-8-sig"), url)
        yield from _walk(window, (), MAX_LEVELS)
        if window.peek():
            raise window.fault("there is more behind its end")


def lines(url: str) -> Iterator[tuple[int, Any]]:
    """The values of the lines of JSON lines, by the number of the line; None for a line that is no JSON."""
    with opened(url) as file:
        number = 0
        while line := file.readline(MAX_ELEMENT + 1):
            number += 1
            if len(line) > MAX_ELEMENT:
                raise DataError(f"{url}, line {number} is longer than {MAX_ELEMENT} bytes; is this JSON lines?")
            if line.strip():
                try:
                    yield number, _DECODER.decode(line.decode("utf-8-sig"))
                except (ValueError, RecursionError):
                    yield number, None


_IN_NUMBERS = "0123456789+-.eE"  # "" is in it too: the end of what was read
_DECODER = json.JSONDecoder(parse_constant=lambda _: None, parse_float=finite)


def _walk(window: _Window, path: tuple[str, ...], levels: int) -> Iterator[tuple[str, Any]]:
    opening = window.peek()
    if opening == "[":
        for _ in window.items("]"):
            yield ".".join(path), window.value()
    elif opening == "{" and levels:
        for _ in window.items("}"):
            key = window.value()
            if not isinstance(key, str) or window.take() != ":":
                raise window.fault("a key and a colon were expected")
            yield from _walk(window, (*path, key), levels - 1)
    else:
        window.value()


class _Window:
    """The part of a file that is being parsed."""

    def __init__(self, text: io.TextIOWrapper, name: str):
        self._text, self._name = text, name
        self._buffer, self._at, self._before = "", 0, 0

    def fault(self, what: str) -> DataError:
        """The error for what stands here."""
        return DataError(f"{self._name} is no JSON, at character {self._before + self._at}: {printable(what)}.")

    def peek(self) -> str:
        """The next character that is no white space; "" at the end of the file."""
        while True:
            while self._at < len(self._buffer):
                if self._buffer[self._at] not in " \t\r\n":
                    return self._buffer[self._at]
                self._at += 1
            if not self._fill():
                return ""

    def take(self) -> str:
        """Go past the next character that is no white space, and return it."""
        character = self.peek()
        self._at += len(character)
        return character

    def items(self, closing: str) -> Iterator[None]:
        """Stop at each item of an array or object, for the caller to parse it."""
        self.take()
        if self.peek() == closing:
            self.take()
            return
        while True:
            yield
            character = self.take()
            if character == closing:
                return
            if character != ",":
                raise self.fault(f"a comma or {closing} was expected")

    def value(self) -> Any:
        """Parse the next value."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._buffer, self._at)
            except RecursionError:
                raise self.fault("it is nested too deeply") from None
            except ValueError as error:
                if len(self._buffer) - self._at <= MAX_ELEMENT and self._fill():
                    continue
                raise self.fault(getattr(error, "msg", str(error))) from None
            # 12 may go on as 123, or as 12.5; what ends by a bracket or quote is whole.
            is_open = isinstance(value, int | float) and self._buffer[end : end + 1] in _IN_NUMBERS
            if is_open and self._fill():
                continue
            self._at = end
            return value

    def _fill(self) -> bool:
        """Read on, more where much is unparsed already; False at the end of the file."""
        try:
            more = self._text.read(max(CHUNK, len(self._buffer) - self._at))
        except UnicodeDecodeError as error:
            raise self.fault(f"it is not UTF-8: {error.reason}") from error
        if more:
            self._before += self._at
            self._buffer, self._at = self._buffer[self._at :] + more, 0
        return bool(more)
