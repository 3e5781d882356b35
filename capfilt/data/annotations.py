"""Annotations: one Parquet per shard, one row per (key, text) with every score; policies read nothing else.

A key that could not be read has a row as well (`status` failed, with its reason): the rows account for every input.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from capfilt.data import parquet
from capfilt.data import scores as score_tables
from capfilt.data.sample import SOURCES
from capfilt.errors import DataError
from capfilt.storage.paths import StoragePath, listing, storage_path

STATUSES = ("ok", "failed")

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("uid", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("candidate", pa.int16(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("itm", pa.float32()),
        pa.field("itc", pa.float32()),
        pa.field("captioner", pa.string(), nullable=False),
        pa.field("filter", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("round", pa.int16(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
    ]
)

PROMPT = pa.field("prompt", pa.string())
"""The column that follows where the captioner names its prompts."""


@dataclass(frozen=True)
class Annotation:
    """One text of one image with its scores; the fields but the last are the columns of `SCHEMA` and `PROMPT`."""

    key: str
    uid: str
    sha256: str
    source: str
    """web | synthetic | human"""
    candidate: int
    """0.. per source"""
    text: str
    itm: float | None
    """P(match) after softmax, in [0, 1]; None where it was not scored"""
    itc: float | None
    """cosine of the two embeddings, in [-1, 1]; None where it was not scored"""
    captioner: str
    """fingerprint of the model that wrote the text; "" for a text that came with the image"""
    filter: str
    """fingerprint of the model that scored it; "" for none"""
    seed: int
    round: int
    """the round that scored it; for a synthetic text that came with the image, the round that wrote it"""
    status: str = "ok"
    """ok | failed"""
    reason: str = ""
    """why it failed; for an ok row "", or a remark: it has no scores, or they are of a long text's beginning"""
    prompt: str | None = None
    """the name of the prompt that a synthetic text answers; None where none is named"""
    scores: Mapping[str, float | None] = field(default_factory=dict, hash=False)
    """by name, the scores beside itm and itc that were read with it (`capfilt.data.scores`)"""

    def score(self, name: str) -> float | None:
        """The value of itm, itc or another score; None where the text has none."""
        return self.itm if name == "itm" else self.itc if name == "itc" else self.scores.get(name)


def check_size(num_rows: int, shard: str) -> None:
    """Raise DataError for more rows of a shard than a table of annotations may have."""
    if num_rows > parquet.MAX_ROWS:
        raise DataError(f"the shard {shard} {parquet.TOO_LARGE}.")


def write(path: StoragePath | str, rows: Iterable[Annotation], prompts: bool = False) -> int:
    """Write one shard's annotations, sorted by (key, source, candidate), zstd, atomically; returns their number. With
    `prompts` they have the column of the prompts.

    The same rows give the same bytes, in whatever order they come, as long as (key, source, candidate) is unique.

    Raises:
        DataError: a row that is not valid (a score out of range or NaN, an unknown source or status, a failed row
            without its reason, a text that is not UTF-8); the message names the key. More rows or bytes than `read`
            takes.
    """
    ordered = sorted(rows, key=lambda row: (row.key, row.source, row.candidate))
    for row in ordered:
        if problem := _problem(row):
            raise DataError(f"annotation of key {row.key!r}, {row.source} {row.candidate}: {problem}")
    try:
        schema = with_prompts(SCHEMA) if prompts else SCHEMA
        columns = {name: [getattr(row, name) for row in ordered] for name in schema.names}
        table = pa.Table.from_pydict(columns, schema=schema)
        parquet.write(storage_path(path), table)
    except (ValueError, TypeError, OverflowError) as error:  # which pyarrow's errors are
        raise DataError(f"annotations for {path} do not fit their columns: {error}") from error
    return len(ordered)


def read(path: StoragePath | str, schema: pa.Schema = SCHEMA, only: Sequence[str] | None = None) -> pa.Table:
    """Read one shard's annotations in bounded memory (`parquet.read`).

    `schema`: the columns of the file, for one that has columns of verdicts too; it may have that of the prompts and
    those of further scores beside. `only`: those that are read of them.

    Raises:
        DataError: no such file, not Parquet, too large, other columns than `schema`, or a row that is not valid.
    """
    where = storage_path(path)
    columns = parquet.schema(where)
    further = score_tables.further(columns.names)
    plain = pa.schema([column for column in columns if column.name not in further])
    typed = all(columns.field(name).equals(score_tables.schema(name).field(0)) for name in further)
    if not typed or (not plain.equals(schema) and not plain.equals(with_prompts(schema))):
        shown = ", ".join(f"{column.name} {column.type}" for column in columns)[:1000]
        raise DataError(f"{path} holds other columns than annotations do: {shown}. Annotate the shard again.")
    table = parquet.read(where, only)
    if wrong := next((name for name, valid in _validity(table) if not pc.all(valid, min_count=0).as_py()), None):
        raise DataError(f"{path} has a row whose {wrong} no annotation has. Annotate the shard again.")
    for name in score_tables.further(table.column_names):
        score_tables.check(table[name], name, where)
    return table


def with_prompts(schema: pa.Schema) -> pa.Schema:
    """A schema of annotations with the column of the prompts behind those of `SCHEMA`."""
    return schema.insert(len(SCHEMA), PROMPT)


def shards_in(folder: StoragePath) -> list[str]:
    """The shards that have annotations in a folder, sorted; it takes one listing."""
    names = os.listdir(folder) if isinstance(folder, Path) and folder.is_dir() else listing(folder)
    return sorted(name.removesuffix(".parquet") for name in names if name.endswith(".parquet"))


def _validity(table: pa.Table) -> Iterator[tuple[str, pa.ChunkedArray]]:
    """Which rows `write` would have written, by column; null for a null."""
    columns = {name: table[name] for name in table.column_names}
    for name, allowed in (("source", SOURCES), ("status", STATUSES)):
        if name in columns:
            yield name, pc.is_in(columns[name], pa.array(allowed, pa.string()))
    for name, low in (("itm", 0), ("itc", -1)):
        if name in columns:
            yield name, pc.and_(pc.greater_equal(columns[name], low), pc.less_equal(columns[name], 1))  # false for NaN
    if "candidate" in columns:
        yield "candidate", pc.greater_equal(columns["candidate"], 0)


def rows(table: pa.Table) -> Iterator[Annotation]:
    """The rows of a table of annotations, converted a batch at a time; columns of further scores become `scores`, those
    of verdicts are left out."""
    further = score_tables.further(table.column_names)
    table = table.select([name for name in (*SCHEMA.names, PROMPT.name, *further) if name in table.column_names])
    for batch in table.to_batches(max_chunksize=1024):
        for values in batch.to_pylist():
            if further:
                values["scores"] = {name: values.pop(name) for name in further}
            yield Annotation(**values)


def _problem(row: Annotation) -> str:
    """What is not valid about a row, or ""."""
    if row.source not in SOURCES:
        return f"source '{row.source}'; allowed are {', '.join(SOURCES)}"
    if row.status not in STATUSES:
        return f"status '{row.status}'; allowed are {', '.join(STATUSES)}"
    if row.status == "failed" and not row.reason:
        return "status failed without a reason; say why"
    for label, score, low in (("itm", row.itm, 0.0), ("itc", row.itc, -1.0)):
        if score is not None and not (math.isfinite(score) and low <= score <= 1.0):
            return f"{label} {score}; allowed is [{low:g}, 1] or null"
    return "" if row.candidate >= 0 else f"candidate {row.candidate}; they count from 0"
