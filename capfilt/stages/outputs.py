"""The files that stages write of shards: tars with a table beside each, and sizes.json beside all of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from capfilt.data import shards
from capfilt.data.sample import Sample
from capfilt.runs.ledger import Ledger
from capfilt.storage import documents, write_guard
from capfilt.storage.atomic import atomic
from capfilt.storage.paths import StoragePath, remove_file


def write_shard(
    tar: StoragePath,
    table: StoragePath,
    samples: Iterable[Sample],
    rows: Sequence[Mapping[str, str | None]],
    columns: Sequence[str],
) -> list[StoragePath]:
    """Write a tar of samples, then a table of the texts that `rows` has by now; returns what to commit.

    Without any sample there is no tar: other loaders fail on an empty one.
    """
    written = [tar, table] if shards.write(tar, samples) else [table]
    if tar not in written:
        remove_tar(tar)
    write_table(table, pa.Table.from_pylist(list(rows), pa.schema([(column, pa.string()) for column in columns])))
    return written


def remove_tar(tar: StoragePath) -> None:
    """Remove the tar of a shard of which nothing is left."""
    write_guard.check_lock(tar)
    remove_file(tar)


def write_table(path: StoragePath, table: pa.Table) -> None:
    """Write Parquet, zstd, atomically."""
    with atomic(path) as file:
        pq.write_table(table, file, compression="zstd")


def sizes_of(ledger: Ledger, names: Collection[str] | None = None) -> dict[str, int]:
    """How many samples the tars have of a ledger's shards, or of those of these names, by file name."""
    done = (one for one in ledger.completions() if names is None or one.shard in names)
    return {f"{one.shard}.tar": kept for one in done if (kept := one.tally.samples["kept"])}


def write_sizes(folder: StoragePath, counts: Mapping[str, int]) -> None:
    """Write sizes.json beside the tars, unless it has these counts already: a rerun changes no file."""
    path = folder / "sizes.json"
    if not path.is_file() or documents.read_json(path, documents.PLAN_BYTES) != counts:
        shards.write_sizes(folder, counts)
