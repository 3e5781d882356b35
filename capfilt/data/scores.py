"""Scores beside itm and itc, as tables beside the annotations: `RUN/scores/NAME/SHARD.parquet`, one float32 a row.

They are tables of their own because a rewritten annotation table and its commit cannot change in one atomic step: so a
score that is added to a finished run leaves every byte of its annotations as it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from capfilt.data import parquet
from capfilt.errors import DataError
from capfilt.storage.atomic import sha256_file
from capfilt.storage.paths import StoragePath, listing

FOLDER = "scores"
"""Beside `annotations/`."""
COSINE = (-1.0, 1.0)
RANGES: dict[str, tuple[float, float] | None] = {
    "itm": (0.0, 1.0),
    "itc": COSINE,
    "sieve": COSINE,
    "aesthetic": None,
    "nsfw": (0.0, 1.0),
    "watermark": (0.0, 1.0),
    "side": None,
    "aspect": None,
    "entropy": (0.0, 8.0),
    "fused": None,  # what a policy makes of several of them: only in what `select` writes
}
"""The least and the greatest value of each score; None for one without bounds. A `clip-NAME` is a cosine."""

_CLIP = re.compile(r"clip-[a-z0-9-]+")
_SHA256 = b"capfilt.annotations_sha256"


def is_score(name: str) -> bool:
    """Whether a column of this name is a score, itm and itc included."""
    return name in RANGES or _CLIP.fullmatch(name) is not None


def range_of(name: str) -> tuple[float, float] | None:
    """The least and the greatest value of a score; None for one without bounds. KeyError for no score."""
    return COSINE if _CLIP.fullmatch(name) else RANGES[name]


def further(columns: Iterable[str]) -> list[str]:
    """Those of the columns of a table that are scores beside itm and itc."""
    return [name for name in columns if is_score(name) and name not in ("itm", "itc")]


def names(folder: StoragePath) -> list[str]:
    """The scores beside itm and itc that a run folder, or a round of a bootstrap, has; sorted."""
    home = folder / FOLDER
    return sorted(further(name for name, stat in listing(home).items() if stat is None)) if home.is_dir() else []


def path_of(folder: StoragePath, name: str, shard: str) -> StoragePath:
    """Where the values of a score for one shard's annotations lie."""
    return folder / FOLDER / name / f"{shard}.parquet"


def schema(name: str) -> pa.Schema:
    """The one column of a score's table."""
    return pa.schema([pa.field(name, pa.float32())])


def write(path: StoragePath, name: str, values: Sequence[float | None], annotations_sha256: str) -> None:
    """Write the values of a score, one for each row of the annotations with this sha256, atomically.

    The same values give the same bytes. DataError for a value out of the score's range, or that is no number.
    """
    column = pa.array(values, pa.float32())
    if (wrong := _wrong(name, pa.chunked_array([column]))) is not None:
        raise DataError(f"{path} would hold {name} {wrong}. This is a bug, please report it.")
    table = pa.table([column], schema(name)).replace_schema_metadata({_SHA256: annotations_sha256.encode()})
    parquet.write(path, table)


def read(path: StoragePath, name: str, annotations_sha256: str) -> pa.ChunkedArray:
    """The values of a score for the annotations with this sha256, in the order of their rows.

    Raises:
        DataError: no such table, another one, a value that the score cannot have, or it was computed from other
            annotations.
    """
    stored = parquet.schema(path)
    if not stored.equals(schema(name)):
        raise DataError(f"{path} holds no {name}, but: {', '.join(stored.names)[:200]}; remove it.")
    if (stored.metadata or {}).get(_SHA256, b"").decode(errors="replace") != annotations_sha256:
        raise DataError(f"{path} belongs to other annotations than there are now: add {name} again (--add-score).")
    column: pa.ChunkedArray = parquet.read(path)[name]
    check(column, name, path)
    return column


def join(table: pa.Table, folder: StoragePath, shard: str, wanted: Iterable[str]) -> pa.Table:
    """A shard's annotations with these scores as further columns, in this order; itm and itc are there already.

    Args:
        table: all rows of `folder/annotations/SHARD.parquet`.
        folder: the run folder, or the round of a bootstrap.

    Raises:
        DataError: one of the scores is not there, or was computed from other annotations than lie there now.
    """
    annotated = folder / "annotations" / f"{shard}.parquet"
    added = further(wanted)
    annotations_sha256 = sha256_file(annotated) if added else ""
    for name in added:
        path = path_of(folder, name, shard)
        if not path.is_file():
            raise missing(folder, name, shard)
        column = read(path, name, annotations_sha256)
        if len(column) != table.num_rows:
            raise DataError(f"{path} has {len(column)} rows, the annotations {table.num_rows}: add {name} again.")
        table = table.append_column(schema(name).field(0), column)
    return table


def missing(folder: StoragePath, name: str, shard: str) -> DataError:
    """The error of a shard without a score."""
    return DataError(f"shard {shard} has no {name} in {folder}: add it with `capfilt annotate --add-score`.")


def join_all(table: pa.Table, folder: StoragePath, shard: str) -> pa.Table:
    """`join` of every score that the folder has; where a shard does not have it, all of its values are null."""
    for name in names(folder):
        if path_of(folder, name, shard).is_file():
            table = join(table, folder, shard, [name])
        else:
            table = table.append_column(schema(name).field(0), pa.nulls(table.num_rows, pa.float32()))
    return table


def check(column: pa.ChunkedArray, name: str, path: StoragePath) -> None:
    """Raise DataError for a value that a score cannot have; `path` is the table that holds it."""
    if (wrong := _wrong(name, column)) is not None:
        raise DataError(f"{path} holds {name} {wrong}; remove it and add {name} again (--add-score).")


def _wrong(name: str, column: pa.ChunkedArray) -> float | None:
    """The first value that a score cannot have."""
    low, high = range_of(name) or (-math.inf, math.inf)
    inside = pc.and_(pc.greater_equal(column, low), pc.less_equal(column, high))
    wrong = column.filter(pc.invert(pc.and_(inside, pc.is_finite(column))))
    return wrong[0].as_py() if len(wrong) else None
