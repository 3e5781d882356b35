"""One type for each column of a list, for all its rows: Arrow's types, among those that JSON can say.

Dates, times and decimals become text: json.dumps cannot write them, and img2dataset drops such rows silently.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from capfilt.errors import DataError

Types = dict[str, pa.DataType]
"""The type of each column, by its name in the plan."""
TEXT_COLUMNS = ("url", "caption")
"""Columns that are text whatever they look like."""
CAPTIONS = pa.list_(pa.struct([("text", pa.string()), ("source", pa.string())]))
"""Several texts of one image, as `captions` of a sample's json has them."""

# Words that mean "nothing" where a number is expected: pyarrow's own list for csv.
_NULL_WORDS = (
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "N/A", "NA", "NULL",
    "NaN", "n/a", "nan", "null",
)  # fmt: skip
_NARROW_TO_WIDE = (pa.int64(), pa.bool_(), pa.float64())
_NUMBERS = {pa.int64(), pa.float64(), pa.float32(), pa.int32(), pa.int16(), pa.int8()}


class TypeClash(Exception):
    """A column needs another type than the rows before had, and the type that holds both."""

    def __init__(self, column: str, wider: pa.DataType) -> None:
        super().__init__(column)
        self.column = column
        self.wider = wider


def typed_table(columns: Mapping[str, Any], types: Types, as_text: Collection[str] = ()) -> pa.Table:
    """Make a table of Python lists or Arrow arrays, each in the type that `types` has for its column.

    A column that `types` lacks is added to it, with the type of these values. Where captions are lists, a column
    `captions` with all of them follows `caption`.

    Args:
        as_text: columns that come as text whatever they mean, those of a csv; they are given the narrowest of integer,
            boolean, float and text that holds them.

    Raises:
        TypeClash: values that the column's type does not hold.
        DataError: values that no json can say, or a url or caption that is no text.
    """
    made: dict[str, Any] = {}
    is_first = "url" not in types
    for name, values in columns.items():
        if name == "caption":
            made |= _caption_columns(values, types, is_first, has_captions="captions" in columns)
        elif name in as_text:
            made[name] = _parsed(name, values, types)
        else:
            made[name] = _converted(name, values, types)
    return pa.table(made)


# ---- captions ----


def _caption_columns(values: Any, types: Types, is_first: bool, has_captions: bool) -> dict[str, Any]:
    """`caption`, and where any row has a list of texts, `captions` beside it.

    TypeClash where the tables before had no such lists.
    """
    rows = values.to_pylist() if isinstance(values, pa.ChunkedArray) and pa.types.is_nested(values.type) else values
    if not isinstance(rows, pa.ChunkedArray) and any(isinstance(row, list) for row in rows):
        if has_captions:
            raise DataError("the captions are lists, which `captions` will hold; rename the column `captions`")
        if not is_first and "captions" not in types:
            raise TypeClash("captions", CAPTIONS)
        types["captions"] = CAPTIONS
    if has_captions or "captions" not in types:
        return {"caption": _converted("caption", rows, types)}
    return _caption_lists(rows.to_pylist() if isinstance(rows, pa.ChunkedArray) else rows, types)


def _caption_lists(rows: list[Any], types: Types) -> dict[str, Any]:
    texts = [[text for text in (row if isinstance(row, list) else [row]) if text not in (None, "")] for row in rows]
    if odd := next((text for row in texts for text in row if not isinstance(text, str | int | float)), None):
        raise DataError(f"a caption is {json.dumps(odd, default=str)[:80]}; allowed are a text and a list of texts")
    utf8 = [[_utf8(str(text)) for text in row] for row in texts]
    captions = [[{"text": text, "source": "web"} for text in row] or None for row in utf8]
    return {
        "caption": _converted("caption", [row[0] if row else None for row in utf8], types),
        "captions": pa.chunked_array([captions], CAPTIONS),
    }


# ---- columns that come as text: csv and tsv ----


def _parsed(name: str, values: Any, types: Types) -> pa.Array:
    """A column of text in its type, which is the narrowest that holds it where `types` has none."""
    column = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else pa.array(values, pa.string())
    if name not in types:
        types[name] = pa.string() if name in TEXT_COLUMNS else _narrowest(column)
    if types[name] == pa.string():
        return column
    try:
        return _parse(column, types[name])
    except pa.ArrowInvalid:
        raise TypeClash(name, _wider(types[name], _narrowest(column))) from None


@functools.cache
def _null_words() -> pa.Array:
    """An array, which pyarrow makes with pandas: not before one is needed, for that takes 0.2 s."""
    return pa.array(_NULL_WORDS)


def _narrowest(column: pa.Array) -> pa.DataType:
    if pc.all(pc.or_(pc.is_null(column), pc.is_in(column, _null_words()))).as_py():
        return pa.string()
    for type_ in _NARROW_TO_WIDE:
        try:
            _parse(column, type_)
        except pa.ArrowInvalid:
            continue
        return type_
    return pa.string()


def _parse(column: pa.Array, type_: pa.DataType) -> pa.Array:
    return pc.cast(pc.if_else(pc.is_in(column, _null_words()), pa.scalar(None, pa.string()), column), type_)


# ---- columns that have types: json and Parquet ----


def _converted(name: str, values: Any, types: Types) -> Any:
    """A column in its type, which is the one that it comes with where `types` has none."""
    if name in TEXT_COLUMNS:
        if (nested := _first_nested(values)) is not None:
            allowed = "a text" if name == "url" else "a text and a list of texts"
            raise DataError(f"a {name} is {json.dumps(nested, default=str)[:80]}; allowed is {allowed}")
        types[name] = pa.string()
    if types.get(name) == pa.string():
        return _as_text(values)
    try:
        column = values if isinstance(values, pa.ChunkedArray) else pa.chunked_array([pa.array(values)])
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):  # values of several types
        raise TypeClash(name, pa.string()) from None
    own_type = _json_type(name, column.type)
    type_ = types.setdefault(name, own_type)
    if pa.types.is_null(own_type) or own_type == type_:
        return _as_text(values) if type_ == pa.string() else column.cast(type_)
    raise TypeClash(name, _wider(type_, own_type))


def _json_type(name: str, type_: pa.DataType) -> pa.DataType:
    """The type that a column of this type is written with; DataError for bytes."""
    if pa.types.is_dictionary(type_):
        return _json_type(name, type_.value_type)
    if pa.types.is_binary(type_) or pa.types.is_large_binary(type_) or pa.types.is_fixed_size_binary(type_):
        raise DataError(f"column {name!r} holds bytes, which no json can; leave it out, or make it text in the list")
    as_text = (pa.types.is_large_string, pa.types.is_string_view, pa.types.is_temporal, pa.types.is_decimal)
    if pa.types.is_null(type_) or any(test(type_) for test in as_text):
        return pa.string()
    return type_


def _wider(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    return pa.float64() if a in _NUMBERS and b in _NUMBERS else pa.string()


def _as_text(values: Any) -> pa.ChunkedArray:
    if isinstance(values, pa.ChunkedArray):
        if values.type == pa.string():
            return values
        type_ = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
        if not pa.types.is_nested(type_):
            return values.cast(type_).cast(pa.string())
        values = values.to_pylist()
    texts = [
        value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        for value in values
    ]
    return pa.chunked_array([[text if text is None else _utf8(text) for text in texts]], pa.string())


def _utf8(text: str) -> str:
    """The text with a question mark for half a character, which json can spell and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def _first_nested(values: Any) -> Any:
    """The first value that is a list or an object; None where there is none."""
    if isinstance(values, pa.ChunkedArray):
        return next(iter(values.drop_null().to_pylist()), None) if pa.types.is_nested(values.type) else None
    return next((value for value in values if isinstance(value, list | dict)), None)
