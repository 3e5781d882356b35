"""Makes text from other people safe to print: on one line, without control characters, of bounded length.

A caption, a key, or the name of a shard or host may hold anything: control sequences of a terminal, line ends that
forge a line of a log, characters that reverse the direction of text, or a hundred megabytes. All of it that is printed,
logged, or counted as a reason goes through `printable`. JSON output has its own escapes, and so have pages.
"""

from __future__ import annotations

import logging
import re
import reprlib
from typing import Any

from capfilt.redact import redact

MAX_NAME = 200
"""Characters of a name: a key, shard, label, source, model, host, or a reason that is counted."""
MAX_MESSAGE = 2000
"""Characters of an error, of a line of a log, of a text in a table."""

_SPACES = re.compile(r"[^\S ]+")  # every white space but " ", line ends too
_COLOURS = re.compile(r"\x1b\[[\d;]*m")


def printable(value: object, limit: int = MAX_NAME) -> str:
    """The text on one line of at most `limit` characters: of a longer one, its beginning and its end.

    Line ends and other white space become a space, other invisible characters their escapes: "\\x1b", "\\u202e".
    Secrets in URLs are removed (`redact`). Text that is printable already stays the same.
    """
    text = value if isinstance(value, str) else str(value)
    if len(text) > 8 * limit:  # more than `limit` at both ends, so that URLs there are recognised
        text = f"{text[: 4 * limit]}…{text[-4 * limit :]}"
    text = redact(text)
    if len(text) <= limit and text.isprintable():
        return text
    cut = len(text) > 2 * limit
    if cut:  # as much as can be in the result: a long text is not scanned
        text = text[:limit] + text[-limit:]
    clean = "".join(c if c.isprintable() else _escaped(c) for c in _SPACES.sub(" ", text))
    if not cut and len(clean) <= limit:
        return clean
    tail = (limit - 1) // 3
    return f"{clean[: limit - 1 - tail]}…{clean[len(clean) - tail :]}"


def printable_lines(text: str) -> str:
    """The output of another program, of any length: lines are kept, colours removed, the rest as in `printable`."""
    lines = redact(_COLOURS.sub("", text)).replace("\r\n", "\n").split("\n")
    return "\n".join("".join(c if c.isprintable() or c == "\t" else _escaped(c) for c in line) for line in lines)


def short_repr(value: object, limit: int = 60) -> str:
    """`repr` in at most `limit` characters, computed without formatting all of a large value."""
    return printable(_REPR.repr(value), limit)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


class _Repr(reprlib.Repr):
    """The standard library's bounded repr; Python refuses to write out an integer of thousands of digits."""

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() < 200 else f"an integer of {x.bit_length()} bits"


_REPR = _Repr()
_REPR.maxstring = _REPR.maxother = 200
_REPR.maxlevel = 3


class PrintableFormatter(logging.Formatter):
    """Formats warnings for the terminal."""

    def format(self, record: Any) -> str:
        """One line, or several where there is a traceback."""
        return (
            printable_lines(super().format(record))
            if record.exc_info
            else printable(super().format(record), MAX_MESSAGE)
        )
