"""The tables of decontamination: a row for each suspect, held-out set and kind of nearness, with the nearest picture.

A held-out text of a few words is equal to many by chance: it has a row, SHORT_TEXT, and is no contamination.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from capfilt.data import parquet
from capfilt.data.duplicates import HELD_OUT
from capfilt.errors import DataError
from capfilt.runs.ledger import Ledger, Output, fingerprint
from capfilt.runs.tally import Tally
from capfilt.stages.near.decontaminate.references import HeldOut
from capfilt.stages.outputs import write_table
from capfilt.storage import write_guard
from capfilt.storage.atomic import atomic
from capfilt.storage.paths import StoragePath, remove_file, table_source

FOLDER = "contaminated"
"""Of the run folder: the tables of the shards."""
TABLE = "contaminated.parquet"
"""Beside it: the rows of all shards that are contaminated, in the order of the shards' names."""
SHORT_TEXT = "short text"
_POOL = "pool"  # what the merged table is of, in its ledger

SCHEMA = pa.schema(
    [
        *(
            pa.field(name, pa.string(), nullable=False)
            for name in ("uid", "key", "shard", "reason", "kind", "set", "held_out_uid", "held_out_key", "copy")
        ),
        pa.field("distance", pa.float64(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Suspect:
    """One row; the fields are the columns of SCHEMA."""

    uid: str
    key: str
    shard: str
    reason: str
    """`held-out image UID`; "" where it is no contamination."""
    kind: str
    """sha256, phash, itc, clip, copy, text, or SHORT_TEXT."""
    set: str
    held_out_uid: str
    held_out_key: str
    copy: str
    """What of the held-out picture is near: "", itself, or its mirror image."""
    distance: float
    """Of phash the bits that differ, of vectors 1 - cosine, else 0."""

    @classmethod
    def near(cls, who: tuple[str, str, str], kind: str, held_out: HeldOut, row: int, distance: float) -> Suspect:
        """The suspect (uid, key and shard) that a row of the held-out pictures accuses."""
        reason = "" if kind == SHORT_TEXT else f"{HELD_OUT}{held_out.uids[row]}"
        picture = (held_out.sets[row], held_out.uids[row], held_out.keys[row], held_out.copies[row])
        return cls(*who, reason, kind, *picture, round(float(distance), 6))


def write(path: StoragePath, suspects: Sequence[Suspect]) -> list[StoragePath]:
    """Write the rows of one shard and return what to commit: nothing where there are none."""
    if not suspects:
        write_guard.check_lock(path)
        remove_file(path)
        return []
    write_table(path, pa.Table.from_pylist([asdict(each) for each in suspects], SCHEMA))
    return [path]


def read(path: StoragePath) -> Iterator[dict[str, Any]]:
    """The rows of a merged table, one batch of them in memory. DataError for a file that is none."""
    try:
        file = pq.ParquetFile(table_source(path))
        if not file.schema_arrow.equals(SCHEMA):
            raise DataError(f"{path} is no table of `capfilt decontaminate`; give the folder of one.")
        for batch in file.iter_batches(8192, use_threads=False):
            yield from batch.to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {path}: {error}") from error


@dataclass(frozen=True)
class Counts:
    """What the tables of a pool say."""

    samples: Counter[str]
    """Contaminated samples under "", and those with a held-out text that is too short to count under SHORT_TEXT."""
    by_set: dict[str, Counter[str]]
    """By set: contaminated samples of each kind."""
    pictures: dict[str, set[str]]
    """By set: the uids of the held-out pictures that are in the pool."""


def merge(out: StoragePath, stages: Iterable[str]) -> Counts:
    """Write the contaminated rows of all shards that the ledgers of some stages have as one table, unless it is there
    already; returns counts."""
    outputs: dict[str, list[Output]] = {}
    for stage in stages:
        for done in Ledger(out, stage).completions():
            if done.outputs:
                outputs.setdefault(done.shard, []).extend(done.outputs)
    ledger, identity = (
        Ledger(out, "contaminated"),
        fingerprint([[*map(asdict, outputs[shard])] for shard in sorted(outputs)]),
    )
    counts = Counts(Counter(), {}, {})
    tables = (_table(out, outputs[shard], counts) for shard in sorted(outputs))
    if ledger.completion(_POOL, identity):
        for _ in tables:  # counted
            pass
        return counts
    with atomic(out / TABLE) as file, pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table.filter(pc.not_equal(table["reason"], "")))
    ledger.commit(_POOL, identity, [out / TABLE], Tally.zero())
    return counts


def _table(out: StoragePath, outputs: Iterable[Output], counts: Counts) -> pa.Table:
    table = pa.concat_tables([parquet.read(out / output.path).cast(SCHEMA) for output in outputs])
    _count(table, counts)
    return table


def _count(table: pa.Table, counts: Counts) -> None:
    """Add a shard's rows; a sample counts once in each place."""
    keys: dict[tuple[str, ...], set[str]] = {}
    for row in table.select(["key", "kind", "set", "held_out_uid"]).to_pylist():
        if row["kind"] == SHORT_TEXT:
            keys.setdefault((SHORT_TEXT,), set()).add(row["key"])
            continue
        keys.setdefault(("",), set()).add(row["key"])
        keys.setdefault((row["set"], row["kind"]), set()).add(row["key"])
        counts.pictures.setdefault(row["set"], set()).add(row["held_out_uid"])
    for place, those in keys.items():
        if len(place) == 1:
            counts.samples[place[0]] += len(those)
        else:
            counts.by_set.setdefault(place[0], Counter())[place[1]] += len(those)
