"""Text that others wrote, made fit to be shown: on one line, without control characters, no longer than stated.

A caption, a key, a shard's or a host's name may hold anything: sequences that a terminal obeys, line ends that forge a
line of a log, signs that turn the direction of reading, or a hundred megabytes. What is shown of such a text, on a
terminal, in a log, in an error or as a reason that is counted, goes through `printable`. JSON output has its own
escapes, and pages have theirs (report/page.py).
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
    """The text on one line of at most `limit` characters; of a longer one the beginning and the end.

    Line ends and other white space become a space, what else cannot be seen becomes its escape: "\\x1b", "\\u202e".
    Secrets of addresses are left out (`redact`). What is printable already stays as it is, so it does no harm to do
    this twice.
    """
    text = value if isinstance(value, str) else str(value)
    if len(text) > 8 * limit:  # its ends are enough to tell where an address begins
        text = f"{text[: 4 * limit]}…{text[-4 * limit :]}"
    text = redact(text)
    if len(text) <= limit and text.isprintable():
        return text
    cut = len(text) > 2 * limit
    if cut:  # as much as can be in the answer; a long text is not gone through
        text = text[:limit] + text[-limit:]
    clean = "".join(c if c.isprintable() else _escaped(c) for c in _SPACES.sub(" ", text))
    if not cut and len(clean) <= limit:
        return clean
    tail = (limit - 1) // 3
    return f"{clean[: limit - 1 - tail]}…{clean[len(clean) - tail :]}"


def printable_lines(text: str) -> str:
    """The same of a piece of another program's output, of any length: its lines stay, its colours go."""
    lines = redact(_COLOURS.sub("", text)).replace("\r\n", "\n").split("\n")
    return "\n".join("".join(c if c.isprintable() or c == "\t" else _escaped(c) for c in line) for line in lines)


def short_repr(value: object, limit: int = 60) -> str:
    """`repr` in at most `limit` characters, made without writing out the rest of a large value."""
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
    """Warnings, as they go to the terminal."""

    def format(self, record: Any) -> str:
        """One line, whatever the names in it hold; a traceback is another matter."""
        return (
            printable_lines(super().format(record))
            if record.exc_info
            else printable(super().format(record), MAX_MESSAGE)
        )
