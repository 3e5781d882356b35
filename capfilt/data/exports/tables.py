"""Parquet tables: pictures with their texts (parquet, hf-dataset), or texts with their URLs (coyo, laion-coco).

What was not measured is null. A measure that came in the json of a sample (a similarity, a count of tokens) is one of
the web text, and is handed on with that text alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import count, islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from capfilt.data.exports.form import Finished, Form, Part, best, number, whole, words
from capfilt.data.images import decode
from capfilt.data.images.perceptual_hash import perceptual_hash
from capfilt.data.sample import Sample, is_text
from capfilt.errors import ImageError
from capfilt.storage.atomic import atomic
from capfilt.storage.paths import StoragePath

Row = dict[str, Any]
ROWS, BYTES = 1000, 32 * 2**20
"""Of a row group at most, the last sample included whole: that is what is in memory."""

_SCORES = [("itm", "double"), ("itc", "double")]
_CAPTIONS = pa.list_(pa.struct([("text", "string"), ("source", "string"), *_SCORES, ("round", "int64")]))
_SIZE = [("width", "int64"), ("height", "int64")]
_IDS = [(name, "string") for name in ("key", "uid", "sha256", "url")]
_PICTURE = [("text", "string"), ("captions", _CAPTIONS), *_IDS, *_SIZE]
PICTURES = pa.schema([("image", "binary"), ("extension", "string"), *_PICTURE, ("json", "string")])
_HF_COLUMNS = pa.schema([("image", pa.struct([("bytes", "binary"), ("path", "string")])), *_PICTURE])

_COUNTS = ("num_tokens_bert", "num_tokens_gpt")
_SIMILARITIES = ("clip_similarity_vitb32", "clip_similarity_vitl14")
_OF_IMAGE = ("nsfw_score_opennsfw2", "nsfw_score_gantman", "watermark_score", "aesthetic_score_laion_v2")
COYO_COLUMNS = pa.schema(
    [("id", "int64"), ("url", "string"), ("text", "string"), *_SIZE, ("image_phash", "string"),
     *((name, "int64") for name in ("text_length", "word_count", *_COUNTS, "num_faces")),
     *((name, "double") for name in (*_SIMILARITIES, *_OF_IMAGE)), ("uid", "string"), ("source", "string"), *_SCORES]
)  # fmt: skip
"""COYO-700M's columns, then ours."""

LAION_COLUMNS = pa.schema(
    [("URL", "string"), ("TEXT", "string"), ("top_caption", "string"), ("all_captions", pa.list_(pa.string())),
     ("all_similarities", pa.list_(pa.float64())), ("WIDTH", "int64"), ("HEIGHT", "int64"), ("similarity", "double"),
     ("hash", "int64"), ("pwatermark", "double"), ("punsafe", "double"), ("uid", "string"), ("itm", "double"),
     ("all_itm", pa.list_(pa.float64()))]
)  # fmt: skip
"""LAION-COCO's columns, then ours."""


def write(
    part: Part, samples: Iterator[Sample], schema: pa.Schema, rows: Callable[[Part, Iterator[Sample]], Iterator[Row]],
    name: Callable[[Part, int], str],
) -> list[StoragePath]:  # fmt: skip
    """The tables of a part, of `per_file` rows each; there is one without rows where there are no samples."""
    made, written = rows(part, samples), []
    for file_number in range(part.files):
        path = part.out / name(part, file_number)
        with atomic(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as table:
            for group in _groups(made, part.per_file):
                table.write_table(pa.Table.from_pylist(group, schema=schema))
        written.append(path)
    return written


def _groups(rows: Iterator[Row], limit: int) -> Iterator[list[Row]]:
    """Row groups of the next rows, `limit` at most in all, 0 for no limit."""
    group, size = list[Row](), 0
    for row in islice(rows, limit or None):
        group.append(row)
        image = row.get("image", b"")
        size += len(image["bytes"] if isinstance(image, dict) else image)
        if len(group) == ROWS or size >= BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def picture_rows(part: Part, samples: Iterator[Sample]) -> Iterator[Row]:
    """A row for each picture with its bytes, all of its texts and its whole json."""
    for sample in samples:
        meta = json.dumps({name: value for name, value in sample.meta.items() if name != "captions"})
        yield {"image": sample.image, "extension": sample.extension, "json": meta, **_picture(part, sample)}


def hf_rows(part: Part, samples: Iterator[Sample]) -> Iterator[Row]:
    """A row for each picture as the feature `Image` of `datasets` has it, with its texts."""
    for sample in samples:
        image = {"bytes": sample.image, "path": f"{sample.uid}.{sample.extension}"}
        yield {"image": image, **_picture(part, sample)}


def coyo_rows(part: Part, samples: Iterator[Sample]) -> Iterator[Row]:
    """A row for each text. `id` counts as Spark's `monotonically_increasing_id` does, with which COYO's were made."""
    ids = count(part.first << 33)
    for sample in samples:
        meta = sample.meta
        shared: Row = {"uid": sample.uid, "url": _url(meta), **_size(sample), "num_faces": whole(meta.get("num_faces"))}
        shared["image_phash"] = words(meta.get("image_phash")) or _phash(sample)
        shared |= {name: number(meta.get(name)) for name in _OF_IMAGE}
        of_text: Row = {name: whole(meta.get(name)) for name in _COUNTS}
        of_text |= {name: number(meta.get(name)) for name in _SIMILARITIES}
        came = [caption for caption in sample.captions if caption["source"] == "web"]
        for caption in sample.captions:
            text = part.text(caption["text"])
            row = {"id": next(ids), "text": text, "text_length": len(text), "word_count": len(text.split())}
            measured = of_text if [caption] == came else {}  # of several web texts it is not known of which
            yield {**row, "source": caption["source"], **shared, **measured, **_scores(caption)}


def laion_rows(part: Part, samples: Iterator[Sample]) -> Iterator[Row]:
    """A row for each picture: the best text that came with it, and the synthetic ones with their cosines."""
    for sample in samples:
        meta, size = sample.meta, _size(sample)
        came = [caption for caption in sample.captions if caption["source"] != "synthetic"]
        synthetic = [caption for caption in sample.captions if caption["source"] == "synthetic"]
        row: Row = {"URL": _url(meta), "uid": sample.uid, "WIDTH": size["width"], "HEIGHT": size["height"]}
        row |= {"hash": whole(meta.get("hash"))} | {x: number(meta.get(x)) for x in ("pwatermark", "punsafe")}
        if came:
            first = best(came)
            row |= {"TEXT": part.text(first["text"]), "similarity": _scores(first)["itc"], "itm": _scores(first)["itm"]}
        if synthetic:
            row["top_caption"] = words(best(synthetic)["text"])
        row["all_captions"] = [part.text(caption["text"]) for caption in synthetic]
        row["all_similarities"] = [_scores(caption)["itc"] for caption in synthetic]
        row["all_itm"] = [_scores(caption)["itm"] for caption in synthetic]
        yield row


def _picture(part: Part, sample: Sample) -> Row:
    captions = [
        {"text": part.text(one["text"]), "source": one["source"], "round": whole(one.get("round")), **_scores(one)}
        for one in sample.captions
    ]
    text = sample.text if is_text(sample.text) else captions[0]["text"] if captions else None
    ids = {"key": words(sample.key), "uid": sample.uid, "sha256": sample.sha256, "url": _url(sample.meta)}
    return {"text": text, "captions": captions, **ids, **_size(sample)}


def _scores(caption: Mapping[str, Any]) -> Row:
    return {name: number(caption.get(name)) for name in ("itm", "itc")}


def _url(meta: Mapping[str, Any]) -> str | None:
    return next((text for name in ("url", "URL") if (text := words(meta.get(name)))), None)


def _size(sample: Sample) -> Row:
    """The size of the picture as it was on the web where the json has it, else as it is here; null for neither."""
    width, height = (whole(sample.meta.get(f"original_{side}")) for side in ("width", "height"))
    if not width or not height:
        try:
            header = decode.inspect(sample.image)
            width, height = header.width, header.height
        except ImageError:
            width = height = None
    return {"width": width, "height": height}


def _phash(sample: Sample) -> str | None:
    """The picture's hash as imagehash writes it."""
    try:
        return f"{perceptual_hash(decode.decode(sample.image)):016x}"
    except ImageError:
        return None


# ---- hf-dataset ----


def _feature(kind: pa.DataType) -> Any:
    """A column in the words of `datasets`."""
    if pa.types.is_list(kind):
        return [_feature(kind.value_type)]
    if pa.types.is_struct(kind):
        return {field.name: _feature(field.type) for field in kind}
    return {"dtype": {"double": "float64"}.get(str(kind), str(kind)), "_type": "Value"}


FEATURES = {field.name: _feature(field.type) for field in _HF_COLUMNS} | {"image": {"_type": "Image"}}
HF_COLUMNS = _HF_COLUMNS.with_metadata({"huggingface": json.dumps({"info": {"features": FEATURES}})})

CARD = """\
---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
---

Written by `capfilt export`: {total:,} pictures with their texts.

```python
from datasets import load_dataset

data = load_dataset("{folder}", split="train")
data[0]["image"], data[0]["text"], data[0]["captions"]
```
"""


def card(out: StoragePath, _parts: Iterable[Finished], total: int) -> list[StoragePath]:
    """Write README.md, which says where the tables lie: `datasets` would also take the ledger's files for data."""
    with atomic(out / "README.md") as file:
        file.write(CARD.format(total=total, folder=out.name).encode())
    return []


def _form(schema: pa.Schema, rows: Callable[[Part, Iterator[Sample]], Iterator[Row]], **more: Any) -> Form:
    name = more.pop("name", lambda part, number: f"{part.name(number)}.parquet")
    return Form(partial(write, schema=schema, rows=rows, name=name), **more)


def _hf_name(part: Part, number: int) -> str:
    return f"data/train-{part.name(number)}-of-{part.total:05d}.parquet"


PARQUET = _form(PICTURES, picture_rows, resharded=True, needs_text=False)
HF = _form(HF_COLUMNS, hf_rows, name=_hf_name, finish=card, resharded=True, needs_text=False)
COYO = _form(COYO_COLUMNS, coyo_rows)
LAION_COCO = _form(LAION_COLUMNS, laion_rows)
