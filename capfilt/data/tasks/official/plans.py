"""Which pictures with which rows a shard will have: one small Parquet a shard, written before any picture is read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from capfilt.data.tasks.official.pictures import PictureFolder
from capfilt.data.tasks.official.rows import OfficialRow, Picture
from capfilt.errors import DataError
from capfilt.storage.atomic import atomic
from capfilt.storage.paths import StoragePath, table_source

_SCHEMA = pa.schema({"pictures": pa.list_(pa.string()), "problem": pa.string(), "rows": pa.string()})


@dataclass(frozen=True)
class PlannedSample:
    """A picture, or a left and a right one, by path, with the rows about it."""

    pictures: tuple[str, ...]
    problem: str
    """Why there is no such picture."""
    rows: tuple[OfficialRow, ...]
    """Each with its problem, where that is known already, and without its pictures."""


def name_of(shard: int) -> str:
    return f"{shard:05d}"


def write(
    folder: StoragePath,
    groups: Iterable[tuple[tuple[Picture, ...], list[OfficialRow]]],
    pictures: PictureFolder,
    size: int,
) -> tuple[int, int]:
    """Write the plans of shards of `size` samples; returns the numbers of both. Memory holds one shard."""
    count = num_samples = 0
    samples = (_planned(names, rows, pictures) for names, rows in groups)
    while batch := list(islice(samples, size)):
        with atomic(folder / f"{name_of(count)}.parquet") as file:
            pq.write_table(pa.Table.from_pylist(batch, schema=_SCHEMA), file, compression="zstd")
        count, num_samples = count + 1, num_samples + len(batch)
    return count, num_samples


def read(folder: StoragePath, shard: str) -> Iterator[PlannedSample]:
    """The samples of a planned shard, in order."""
    table = pq.read_table(table_source(folder / f"{shard}.parquet"), partitioning=None)
    for sample in table.to_pylist():
        rows = tuple(OfficialRow(**row, pictures=()) for row in json.loads(sample["rows"]))
        yield PlannedSample(tuple(sample["pictures"]), sample["problem"], rows)


def _planned(names: Sequence[Picture], rows: list[OfficialRow], pictures: PictureFolder) -> dict[str, Any]:
    paths, problem = [], "" if names else rows[0].problem
    try:
        paths = [pictures.find(name) for name in names]
    except DataError as error:
        problem = str(error)
    fields = [{"kind": row.kind, "id": row.id, "value": row.value, "problem": row.problem} for row in rows]
    return {"pictures": paths, "problem": problem, "rows": json.dumps(fields)}
