"""One type a column, for all of a list: Arrow's, among those that JSON can say.

Dates, times and decimals become text: json.dumps cannot write them, and img2dataset loses such rows without a word.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from capfilt.errors import DataError

Types = dict[str, pa.DataType]
TEXTS = ("url", "caption")
"""Columns that are text whatever they look like."""
CAPTIONS = pa.list_(pa.struct([("text", pa.string()), ("source", pa.string())]))
"""Several texts of one image, as `captions` of a sample's json has them."""

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


def fit(columns: Mapping[str, Any], types: Types, spelled: Collection[str] = ()) -> pa.Table:
    """Make a table of Python lists or Arrow columns, each in the type of its column.

    `spelled`: columns that are text whatever they mean, those of a csv; they get the types they have: integers,
    booleans, floats, else text. Where the captions are lists, `captions` follows with all of them.
    """
    made: dict[str, Any] = {}
    first = "url" not in types
    for name, values in columns.items():
        if name == "caption":
            made |= _captions(values, types, first, taken="captions" in columns)
        elif name in spelled:
            made[name] = _spelled(name, values, types)
        else:
            made[name] = _fitted(name, values, types)
    return pa.table(made)


def _captions(values: Any, types: Types, first: bool, taken: bool) -> dict[str, Any]:
    """An image's text, and where any image has a list of them, all of them beside it.

    Only what follows tells whether a list of URLs has such lists: Clash where it was not known from the first table.
    """
    rows = values.to_pylist() if isinstance(values, pa.ChunkedArray) and pa.types.is_nested(values.type) else values
    if not isinstance(rows, pa.ChunkedArray) and any(isinstance(row, list) for row in rows):
        if taken:
            raise DataError("the captions are lists, which `captions` will hold; rename the column `captions`")
        if not first and "captions" not in types:
            raise Clash("captions", CAPTIONS)
        types["captions"] = CAPTIONS
    if taken or "captions" not in types:
        return {"caption": _fitted("caption", rows, types)}
    rows = rows.to_pylist() if isinstance(rows, pa.ChunkedArray) else rows
    texts = [[text for text in (row if isinstance(row, list) else [row]) if text not in (None, "")] for row in rows]
    if odd := next((text for row in texts for text in row if not isinstance(text, str | int | float)), None):
        raise DataError(f"a caption is {json.dumps(odd, default=str)[:80]}; allowed are a text and a list of texts")
    plain = [[_utf8(str(text)) for text in row] for row in texts]
    captions = [[{"text": text, "source": "web"} for text in row] or None for row in plain]
    return {
        "caption": _fitted("caption", [row[0] if row else None for row in plain], types),
        "captions": pa.chunked_array([captions], CAPTIONS),
    }


def _narrowest(column: pa.Array) -> pa.DataType:
    if pc.all(pc.or_(pc.is_null(column), pc.is_in(column, _NOTHING))).as_py():
        return pa.string()
    for kind in _LADDER:
        try:
            _numbers(column, kind)
        except pa.ArrowInvalid:
            continue
        return kind
    return pa.string()


def _spelled(name: str, values: Any, types: Types) -> pa.Array:
    column = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else pa.array(values, pa.string())
    if name not in types:
        types[name] = pa.string() if name in TEXTS else _narrowest(column)
    kind = types[name]
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
        if name in TEXTS and (odd := _nested(values)) is not None:
            allowed = "a text" if name == "url" else "a text and a list of texts"
            raise DataError(f"a {name} is {json.dumps(odd, default=str)[:80]}; allowed is {allowed}")
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
    return pa.chunked_array([[text if text is None else _utf8(text) for text in texts]], pa.string())


def _utf8(text: str) -> str:
    """Half a character, which json can spell and UTF-8 cannot, becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


def _nested(values: Any) -> Any:
    """The first value that is no single one; None where all are."""
    if isinstance(values, pa.ChunkedArray):
        return next(iter(values.drop_null().to_pylist()), None) if pa.types.is_nested(values.type) else None
    return next((value for value in values if isinstance(value, list | dict)), None)
