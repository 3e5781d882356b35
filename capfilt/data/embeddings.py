"""Embeddings: one Parquet per shard, one row per picture with its hashes, its size and, on request, a vector.

Exact copies of a picture share their uid where it comes from their bytes: rows of different pictures are told apart by
shard and key. A pool's rows have global numbers: its shards sorted by name, the rows of each in order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from capfilt.data import parquet
from capfilt.data.images.perceptual_hash import perceptual_hash
from capfilt.data.sample import Sample
from capfilt.errors import DataError, FolderError
from capfilt.storage.paths import StoragePath, listing, storage_path

FOLDER = "embeddings"
"""Of a run folder: where its tables are."""

MODEL = "model.json"
"""Of a run folder: what made the vectors, and where it was."""

Kind = Literal["itc", "clip", "copy"]
"""What a vector is: of a filter's image-text contrast, of CLIP or its kin, of a copy-detection descriptor."""


def kind_of(capabilities: frozenset[str]) -> Kind:
    """Of which kind a model's vectors are: CLIP and its kin never read an image and a text together."""
    return "itc" if "fuse" in capabilities else "clip"


SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("uid", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("phash", pa.uint64(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
    ]
)
"""The columns of a table without vectors. With them there is `vector`, fixed_size_list<float16>, as its last column."""

_METADATA = b"capfilt.vectors"
_UNIT = (0.98, 1.02)  # what the length of a unit vector may be in float16


@dataclass(frozen=True)
class Vectors:
    """What the vectors of a table are."""

    kind: Kind
    model: str
    """The fingerprint of the model that made them."""
    dim: int

    @property
    def schema(self) -> pa.Schema:
        """The columns of a table with such vectors."""
        field = pa.field("vector", pa.list_(pa.float16(), self.dim), nullable=False)
        return SCHEMA.append(field).with_metadata({_METADATA: json.dumps(asdict(self), sort_keys=True)})

    def __str__(self) -> str:
        return f"{self.kind} vectors of {self.dim} numbers by {self.model[:12]}"


@dataclass(frozen=True)
class Embedding:
    """One picture; the fields are the columns of `SCHEMA`."""

    key: str
    uid: str
    sha256: str
    phash: int
    """As `perceptual_hash` gives it."""
    width: int
    """Pixels of the upright picture."""
    height: int

    @classmethod
    def of(cls, sample: Sample, picture: Image.Image) -> Embedding:
        return cls(sample.key, sample.uid, sample.sha256, perceptual_hash(picture), *picture.size)


def write(
    path: StoragePath | str, rows: Sequence[Embedding], vectors: Vectors | None = None, values: Any = None
) -> None:
    """Write one shard's pictures in the order of the shard, zstd, atomically.

    `values`: their vectors, numpy floats [len(rows), dim] of unit length, where `vectors` says what they are.

    Raises:
        DataError: vectors that are not finite or not of unit length; the message names the key. More rows or bytes
            than `read` takes.
    """
    columns: list[Any] = [
        pa.array([getattr(row, field.name) for row in rows], field.type, safe=True) for field in SCHEMA
    ]
    schema = SCHEMA
    if vectors is not None:
        half = np.asarray(values, np.float16).reshape(len(rows), vectors.dim)
        if (bad := _bad_vector(half)) is not None:
            raise DataError(f"the vector of key {rows[bad].key!r} is not of unit length: the model gives no use here.")
        columns.append(pa.FixedSizeListArray.from_arrays(pa.array(half.ravel()), vectors.dim))
        schema = vectors.schema
    table = pa.Table.from_arrays(columns, schema=schema)
    if len(rows) * (vectors.dim if vectors else 0) > parquet.MAX_VALUES:
        raise DataError(f"the shard of {path} {parquet.TOO_LARGE}.")
    # Numbers of a vector do not repeat: a dictionary of them is larger than they are.
    parquet.write(storage_path(path), table, use_dictionary=SCHEMA.names)


def read(path: StoragePath | str, with_vectors: bool = True) -> pa.Table:
    """Read one shard's pictures in bounded memory (`parquet.read`), with their vectors if it has any or without.

    Raises:
        DataError: no such file, not Parquet, too large, other columns, or a value that no picture has, such as a
            vector that is not finite; the message names the key.
    """
    where = storage_path(path)
    vectors = vectors_of(where)
    table = parquet.read(where, None if with_vectors else SCHEMA.names)
    for name, valid in (("width", pc.greater(table["width"], 0)), ("height", pc.greater(table["height"], 0))):
        if not pc.all(valid, min_count=0).as_py():
            raise DataError(f"{path} has a row whose {name} no picture has. Embed the shard again.")
    if any(column.null_count for column in table.columns):
        raise DataError(f"{path} has a row without a value. Embed the shard again.")
    if vectors is not None and with_vectors and (bad := _bad_vector(matrix(table))) is not None:
        raise DataError(
            f"{path}: the vector of key {table['key'][bad].as_py()!r} is not finite or not of unit length."
            " Embed the shard again."
        )
    return table


def vectors_of(path: StoragePath) -> Vectors | None:
    """What the vectors of a table are; None where it has none. DataError for a file that is no table of pictures."""
    columns = parquet.schema(path)
    if columns.equals(SCHEMA):
        return None
    try:
        said = json.loads((columns.metadata or {})[_METADATA])
        vectors = Vectors(str(said["kind"]), str(said["model"]), int(said["dim"]))  # type: ignore[arg-type]
        if vectors.kind in get_args(Kind) and vectors.dim > 0 and columns.equals(vectors.schema):
            return vectors
    except (KeyError, TypeError, ValueError):
        pass
    shown = ", ".join(f"{column.name} {column.type}" for column in columns)[:1000]
    raise DataError(f"{path} holds other columns than `capfilt embed` writes: {shown}. Embed the shard again.")


def matrix(table: pa.Table) -> np.ndarray:
    """The vectors of a table, float16 [rows, dim]."""
    column = table["vector"].combine_chunks()
    values: np.ndarray = column.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(table.num_rows, column.type.list_size)


def path_of(folder: StoragePath, shard: str) -> StoragePath:
    """Where a run folder has the table of a shard."""
    return folder / FOLDER / f"{shard}.parquet"


def tables(folder: StoragePath) -> dict[str, StoragePath]:
    """The tables of a run folder by the name of their shard, in the order of the pool.

    FolderError where it has none: it is not the --out of `capfilt embed`.
    """
    inside = folder / FOLDER
    files = listing(inside) if inside.is_dir() else ()
    names = sorted(name.removesuffix(".parquet") for name in files if name.endswith(".parquet"))
    if not names:
        raise FolderError(
            f"{folder} holds no {FOLDER}/: give the --out of `capfilt embed`, or of `capfilt annotate --keep-vectors`."
        )
    return {name: path_of(folder, name) for name in names}


def check_same_model(paths: Iterable[StoragePath]) -> Vectors | None:
    """What the vectors of all tables are; None where they have none. DataError where two differ: no distance between
    vectors of two models means anything."""
    first: tuple[StoragePath, Vectors | None] | None = None
    for path in paths:
        vectors = vectors_of(path)
        if first is None:
            first = path, vectors
        elif vectors != first[1]:
            raise DataError(
                f"{path} has {vectors or 'no vectors'} and {first[0]} {first[1] or 'none'}: vectors of one pool must be"
                " of one model; embed all its shards with the same --model."
            )
    return None if first is None else first[1]


def _bad_vector(half: np.ndarray) -> int | None:
    """The first row that is no unit vector; None for none. A row at a time would be slow, all at once large."""
    for start in range(0, len(half), 4096):
        lengths = np.linalg.norm(half[start : start + 4096].astype(np.float32), axis=1)
        bad = ~((lengths > _UNIT[0]) & (lengths < _UNIT[1]))  # NaN is neither
        if bad.any():
            return start + int(bad.argmax())
    return None
