"""Which columns of a table hold pictures, texts and names of files: said by options, else known by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from capfilt.data.parquet import is_bounded
from capfilt.data.shards.sources.view import check_options
from capfilt.errors import NoShardError, did_you_mean

IMAGE = ("image", "img", "picture", "jpg", "jpeg", "png", "webp", "image_bytes", "img_bytes", "bytes", "content")
TEXT = (
    *("text", "caption", "captions", "texts", "txt", "alt_text", "alttext", "alt"),
    *("sentences", "sentence", "description", "title", "prompt"),
)
FILE = ("file_name", "filename", "file", "image_path", "filepath", "file_path", "path", "image", "img", "picture")
URL = ("url", "image_url", "imageurl", "img_url", "uri", "src")
MAX_COLUMNS = 64
"""Further columns that go into a sample's json."""


@dataclass(frozen=True)
class Columns:
    """The columns of a table that are read."""

    image: str
    text: str | None
    meta: tuple[str, ...] = ()
    """Columns of single values, which go into the json."""

    @property
    def all(self) -> list[str]:
        """Each of them once."""
        return list(dict.fromkeys([self.image, *([self.text] if self.text else []), *self.meta]))


def known(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    """The column that has the first of the wanted names, in whatever case; None where there is none."""
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[name] for name in wanted if name in lower), None)


def choose(location: str, schema: pa.Schema, options: Mapping[str, str]) -> Columns:
    """The columns of a table of pictures; `options` may name `image` and `text`, "" for no text.

    Raises:
        NoShardError: the table holds no bytes of pictures, or URLs in their place; or it is not known which column.
    """
    check_options(location, options, ("image", "text"))
    for name in options.values():
        if name and name not in schema.names:
            hint = did_you_mean(name, schema.names)
            raise NoShardError(f"{location} has no column {name!r}.{hint} Columns: {', '.join(schema.names[:20])}.")
    image = options.get("image") or _image(location, schema)
    if not _holds_bytes(schema.field(image).type):
        what = schema.field(image).type
        raise NoShardError(f"{location}: column {image!r} is {what}, not bytes or a struct of bytes and path.")
    texts = [field.name for field in schema if _holds_texts(field.type)]
    text = options.get("text", known(texts, TEXT))
    if text is None and (others := [name for name in texts if known([name], (*FILE, *URL, "uid", "__key__")) is None]):
        raise NoShardError(
            f"{location}: which column holds the texts: {', '.join(others[:20])}? Write {location}#text={others[0]},"
            f" or {location}#text= for none."
        )
    meta = [field.name for field in schema if _is_single(field.type) and field.name not in (image, text)]
    return Columns(image, text or None, tuple(meta[:MAX_COLUMNS]))


def _image(location: str, schema: pa.Schema) -> str:
    """The column of pictures, known by its name or because it is the only one of bytes."""
    of_bytes = [field.name for field in schema if _holds_bytes(field.type)]
    if name := known(of_bytes, IMAGE) or (of_bytes[0] if len(of_bytes) == 1 else None):
        return name
    if of_bytes:
        raise NoShardError(
            f"{location}: which column holds the pictures: {', '.join(of_bytes)}? Write {location}#image={of_bytes[0]}."
        )
    texts = [field.name for field in schema if _holds_texts(field.type)]
    if url := known(texts, URL):
        flags = "" if url == "url" else f" --url-col {url}"
        caption, uid = known(texts, TEXT), known(texts, ("uid",))
        flags += f" --caption-col {caption}" if caption else ""
        flags += f" --save-additional-columns {uid}" if uid else ""
        raise NoShardError(
            f"{location} has URLs of pictures, not their bytes: fetch them first with `capfilt download"
            f" {location}{flags} --out SHARDS`, and give SHARDS."
        )
    raise NoShardError(f"{location} has no column of pictures, and none of URLs: {', '.join(schema.names[:20])}.")


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _holds_bytes(kind: pa.DataType) -> bool:
    kind, types = _plain(kind), pa.types
    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and is_bounded(kind) and _holds_bytes(kind.field("bytes").type)
    return any(is_kind(kind) for is_kind in (types.is_binary, types.is_large_binary))


def _holds_texts(kind: pa.DataType) -> bool:
    kind, types = _plain(kind), pa.types
    if types.is_list(kind) or types.is_large_list(kind):
        kind = kind.value_type
    return any(is_kind(kind) for is_kind in (types.is_string, types.is_large_string))


def _is_single(kind: pa.DataType) -> bool:
    kind, types = _plain(kind), pa.types
    kinds = (types.is_string, types.is_large_string, types.is_boolean, types.is_integer, types.is_floating)
    return any(is_kind(kind) for is_kind in kinds)
