"""One type a column, for all of a list: Arrow's, among those that JSON can say.

Dates, times and decimals become text: json.dumps cannot write them, and img2dataset loses such rows without a word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from capfilt.errors import DataError

Types = dict[str, pa.DataType]
TEXTS = ("url", "caption")
"""Columns that are text whatever they look like."""

# Words for "nothing" where a number is expected: pyarrow's own list for csv.
_NOTHING = pa.array(
    ["", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "N/A", "NA", "NULL",
     "NaN", "n/a", "nan", "null"]
)  # fmt: skip
_LADDER = (pa.int64(), pa.bool_(), pa.float64())


class Clash(Exception):
    """A column of another type than the rows before promised, and the type that would hold both."""

    def __init__(self, column: str, wider: pa.DataType) -> None:
        super().__init__(column)
        self.column = column
        self.wider = wider


def fit_text(table: pa.Table, types: Types) -> pa.Table:
    """Give the columns of a csv, all text, the types they have: integers, booleans, floats, else text."""
    made = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        if name not in types:
            types[name] = pa.string() if name in TEXTS else _narrowest(column)
        made[name] = _read(name, column, types[name])
    return pa.table(made)


def fit(columns: Mapping[str, Any], types: Types) -> pa.Table:
    """Make a table of Python lists or Arrow columns, each in the type of its column."""
    return pa.table({name: _fitted(name, values, types) for name, values in columns.items()})


def _narrowest(column: pa.Array) -> pa.DataType:
    if pc.all(pc.is_in(column, _NOTHING)).as_py():
        return pa.string()
    for kind in _LADDER:
        try:
            _numbers(column, kind)
        except pa.ArrowInvalid:
            continue
        return kind
    return pa.string()


def _read(name: str, column: pa.Array, kind: pa.DataType) -> pa.Array:
    if kind == pa.string():
        return column
    try:
        return _numbers(column, kind)
    except pa.ArrowInvalid:
        raise Clash(name, _wider(kind, _narrowest(column))) from None


def _numbers(column: pa.Array, kind: pa.DataType) -> pa.Array:
    return pc.cast(pc.if_else(pc.is_in(column, _NOTHING), pa.scalar(None, pa.string()), column), kind)


def _fitted(name: str, values: Any, types: Types) -> Any:
    kind = types.get(name)
    if name in TEXTS or kind == pa.string():
        types[name] = pa.string()
        return _as_text(values)
    try:
        made = values if isinstance(values, pa.ChunkedArray) else pa.chunked_array([pa.array(values)])
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):  # a column of many kinds
        raise Clash(name, pa.string()) from None
    found = _plain(name, made.type)
    if kind is None:
        types[name] = kind = found
    if pa.types.is_null(found) or found == kind:
        return _as_text(values) if kind == pa.string() else made.cast(kind)
    raise Clash(name, _wider(kind, found))


def _plain(name: str, kind: pa.DataType) -> pa.DataType:
    """The type that a column of this type is written with."""
    if pa.types.is_dictionary(kind):
        return _plain(name, kind.value_type)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        raise DataError(f"column {name!r} holds bytes, which no json can; leave it out, or make it text in the list")
    texts = (pa.types.is_large_string, pa.types.is_string_view, pa.types.is_temporal, pa.types.is_decimal)
    if pa.types.is_null(kind) or any(test(kind) for test in texts):
        return pa.string()
    return kind


def _wider(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    numbers = {pa.int64(), pa.float64(), pa.float32(), pa.int32(), pa.int16(), pa.int8()}
    return pa.float64() if a in numbers and b in numbers else pa.string()


def _as_text(values: Any) -> pa.ChunkedArray:
    if isinstance(values, pa.ChunkedArray):
        if values.type == pa.string():
            return values
        kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
        if not pa.types.is_nested(kind):
            return values.cast(kind).cast(pa.string())
        values = values.to_pylist()
    texts = [
        value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        for value in values
    ]
    # Half a character, which json can spell and UTF-8 cannot, becomes a question mark.
    return pa.chunked_array([[t if t is None else t.encode("utf-8", "replace").decode() for t in texts]], pa.string())
