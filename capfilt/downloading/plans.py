"""Shard plans: which rows a shard will fetch, one small Parquet a shard, written before anything is fetched.

A list is planned once, as pass 0; every retry of what failed is a further pass with shards of its own. The file of a
pass is written after its shards, so a plan that was cut short counts as none and is made again.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from capfilt.config import Config, validate
from capfilt.downloading.failures import PLACEHOLDER, kind_of
from capfilt.downloading.url_lists.column_types import TypeClash, Types
from capfilt.downloading.url_lists.files import BadRows, ListFile
from capfilt.downloading.url_lists.tables import Columns, read_tables
from capfilt.errors import DataError
from capfilt.storage import documents
from capfilt.storage.atomic import atomic, write_json
from capfilt.storage.paths import StoragePath, listing, remove_file, table_source

OnProgress = Callable[[int], None]
"""Called with the number of rows planned so far."""
ALL_KINDS = "failed"
"""Stands for every kind of failure in `--retry`, but for placeholders, whose pictures did come."""


class ShardLayout(Config):
    """How shards are cut and named."""

    size: int = Field(default=10_000, gt=0)
    """Rows of a shard."""
    digits: int = Field(default=5, ge=1, le=12)
    """Digits of a shard's name."""

    def name(self, shard: int) -> str:
        """A shard's name as img2dataset writes it: its number with leading zeros."""
        return f"{shard:0{self.digits}d}"


class Pass(Config):
    """One planned pass over a list, or over what failed of it."""

    number: int
    first: int
    """The number of its first shard."""
    shards: int
    rows: int
    unreadable: int = 0
    """Rows of the list that cannot be read: too many fields, broken JSON."""
    kinds: tuple[str, ...] = ()
    """Of a retry: the kinds of failure that it tries again, or ALL_KINDS."""
    retried: dict[str, int] = {}
    """Of a retry: how many rows of each kind it took over from the passes before."""

    def retries(self, kind: str) -> bool:
        """Whether this pass tries rows again that failed with `kind`."""
        return _covers(self.kinds, kind)


def passes(folder: StoragePath) -> list[Pass]:
    """The passes that are planned in `folder`, in order."""
    matches = (re.fullmatch(r"pass-(\d{1,9})\.json", name) for name in listing(folder))
    paths = [folder / f"pass-{number}.json" for number in sorted(int(match[1]) for match in matches if match)]
    return [validate(Pass, documents.read_json(path), path) for path in paths]


def read(folder: StoragePath, shard: str) -> pa.Table:
    """The planned rows of one shard, in order."""
    return pq.read_table(table_source(folder / f"{shard}.parquet"), partitioning=None)


def plan_list(
    folder: StoragePath,
    files: Sequence[ListFile],
    columns: Columns,
    layout: ShardLayout,
    on_progress: OnProgress = lambda _: None,
) -> Pass:
    """Split a list into shards of `layout.size` rows; every file of it begins a new one, as in img2dataset.

    Memory holds one table of `layout.size` rows, however long the list is.

    Raises:
        DataError: a list that cannot be read, has no rows, or makes more shards than their names have digits for.
    """
    if any(file.format == "txt" for file in files) and len(columns.by_new_name) > 1:
        raise DataError("a txt list has URLs alone; leave --caption-col and --save-additional-columns out")
    types: Types = {}
    while True:
        bad_rows = BadRows()
        try:
            tables = (
                table for file in files for table in _resized(read_tables(file, columns, types, bad_rows), layout.size)
            )
            shards, rows = _write_shards(folder, tables, 0, layout, on_progress)
            break
        except TypeClash as clash:
            types[clash.column] = clash.wider
    if not rows:
        raise DataError(f"the list has no rows: {', '.join(file.url for file in files[:3])}")
    return _write_pass(folder, Pass(number=0, first=0, shards=shards, rows=rows, unreadable=bad_rows.count))


def plan_retry(
    folder: StoragePath,
    before: Sequence[Pass],
    shards: StoragePath,
    columns: Columns,
    kinds: Sequence[str],
    layout: ShardLayout,
) -> Pass | None:
    """Plan the rows that failed with one of `kinds` and were not tried again since; None where there are none.

    `shards`: the folder with the Parquets of all passes before, complete.
    """
    first = before[-1].first + before[-1].shards  # beyond the digits names become longer, as `str.format` makes them
    retried: Counter[str] = Counter()
    names = list(columns.by_new_name)

    def failed_tables() -> Iterator[pa.Table]:
        for shard in range(first):
            later = [other for other in before if other.first > shard]
            table, counts = _rows_to_retry(shards / f"{layout.name(shard)}.parquet", later, kinds, names)
            retried.update(counts)
            yield table

    count, rows = _write_shards(folder, _resized(failed_tables(), layout.size), first, layout, lambda _: None)
    if not rows:
        return None
    planned = Pass(
        number=len(before), first=first, shards=count, rows=rows, kinds=tuple(sorted(kinds)), retried=dict(retried)
    )
    return _write_pass(folder, planned)


def remove_unfinished(folder: StoragePath) -> None:
    """Remove the shards of a plan whose pass was never written."""
    for path in folder.glob("*.parquet"):
        remove_file(path)


def _rows_to_retry(
    path: StoragePath, later: Sequence[Pass], kinds: Sequence[str], names: list[str]
) -> tuple[pa.Table, Counter[str]]:
    """The rows of one shard that are to be tried again, and their number by kind."""
    table = pq.read_table(table_source(path), partitioning=None)
    if "captions" not in names and "captions" in table.column_names:  # all texts of images that came with several
        names = [*names[:-1], "captions", names[-1]]
    row_kinds = [kind_of(message or "") for message in table["error_message"].to_pylist()]
    chosen = [_covers(kinds, kind) and not any(other.retries(kind) for other in later) for kind in row_kinds]
    counts = Counter(kind for kind, is_chosen in zip(row_kinds, chosen, strict=True) if is_chosen)
    return table.filter(pa.array(chosen, pa.bool_())).select(names), counts


def _covers(kinds: Sequence[str], kind: str) -> bool:
    return bool(kind) and (kind in kinds or (ALL_KINDS in kinds and kind != PLACEHOLDER))


def _resized(tables: Iterator[pa.Table], size: int) -> Iterator[pa.Table]:
    """The same rows in tables of `size` rows, the last one smaller."""
    held: list[pa.Table] = []
    count = 0
    for table in tables:
        held.append(table)
        count += table.num_rows
        while count >= size:
            whole = pa.concat_tables(held)
            yield whole.slice(0, size)
            held, count = [whole.slice(size)], count - size
    if count:
        yield pa.concat_tables(held)


def _write_shards(
    folder: StoragePath, tables: Iterator[pa.Table], first: int, layout: ShardLayout, on_progress: OnProgress
) -> tuple[int, int]:
    """Write each table as a shard's plan, numbered from `first`; returns the numbers of shards and rows."""
    shards = rows = 0
    for table in tables:
        if not first and len(str(shards)) > layout.digits:
            raise DataError(
                f"more than {10**layout.digits} shards would be written, whose names have {layout.digits} digits;"
                " take a larger --shard-size, or more digits by --oom-shard-count"
            )
        with atomic(folder / f"{layout.name(first + shards)}.parquet") as file:
            pq.write_table(table.combine_chunks(), file, compression="zstd")
        shards, rows = shards + 1, rows + table.num_rows
        on_progress(rows)
    return shards, rows


def _write_pass(folder: StoragePath, planned: Pass) -> Pass:
    write_json(folder / f"pass-{planned.number}.json", planned.model_dump(mode="json"))
    return planned
