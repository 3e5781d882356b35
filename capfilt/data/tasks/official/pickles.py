"""Pickles of strangers, of which only containers, texts and numbers are read.

A pickle is a program. Its instructions are read first, and any that could import or call something, or have the
machine's memory filled by a few bytes, ends the reading.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import Any

from capfilt.data.tasks.official.json_stream import opened
from capfilt.errors import DataError

MAX_BYTES = 2**28
"""Of a file; REFER's largest has some 20 MB."""

_INSTRUCTIONS = """
    PROTO FRAME STOP MARK POP POP_MARK DUP
    PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET
    NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
    EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
    EMPTY_DICT DICT SETITEM SETITEMS
"""
_ALLOWED = frozenset(_INSTRUCTIONS.split())


class _Containers(pickle.Unpickler):
    """Imports nothing: a second lock behind that of the instructions."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it imports {module}.{name}")


def read_pickle(url: str) -> Any:
    """What a pickle of containers, texts and numbers holds; texts of Python 2 are read as UTF-8.

    Raises:
        ListError: there is no such file.
        DataError: it is too large, is no pickle, or would do anything else than hold data.
    """
    with opened(url) as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise DataError(f"{url} is larger than {MAX_BYTES // 2**20} MiB; a pickle of REFER has some 20 MB.")
    try:
        _check(data)
        return _Containers(io.BytesIO(data), encoding="utf-8", errors="replace").load()
    except (pickle.UnpicklingError, ValueError, EOFError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"{url} is no pickle that can be read: {error}. Lists, dicts, texts and numbers are, and nothing else."
        ) from error


def _check(data: bytes) -> None:
    """Raise UnpicklingError for an instruction that is not needed for data, ValueError for a damaged pickle."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data), 1):
        if opcode.name not in _ALLOWED:
            raise pickle.UnpicklingError(f"it has the instruction {opcode.name} {argument or ''}".rstrip())
        # The memo is a table that grows to the largest number: one of four bytes would take 16 GB.
        if opcode.name.endswith("PUT") and int(argument or 0) > count:
            raise pickle.UnpicklingError(f"it numbers an object {argument} after {count} instructions")
