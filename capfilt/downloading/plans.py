"""Shard plans: which rows a shard will fetch, one small Parquet a shard, written before anything is fetched.

A list is planned once, as pass 0; every retry of what failed is a further pass with shards of its own. The file
of a pass is written after its shards, so a plan that was cut short counts as none and is made again.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from capfilt.config import Config, validated
from capfilt.downloading import url_lists
from capfilt.downloading.column_types import Clash, Types
from capfilt.downloading.failures import kind_of
from capfilt.downloading.url_lists import Columns, Source
from capfilt.errors import DataError
from capfilt.storage import documents
from capfilt.storage.atomic import atomic, write_json
from capfilt.storage.paths import StoragePath, listing, table_source

OnProgress = Callable[[int], None]
"""Is told how many rows are planned so far."""


EVERY = "failed"
"""What a retry of all kinds calls them."""


class Pass(Config):
    """One planned pass over a list, or over what failed of it."""

    number: int
    first: int
    """The number of its first shard."""
    shards: int
    rows: int
    unreadable: int = 0
    """Rows of the list that are no rows: too many fields, broken JSON."""
    kinds: tuple[str, ...] = ()
    """Of a retry: the kinds of failure that it tries again; EVERY stands for all but placeholders, which did come."""
    retried: dict[str, int] = {}
    """Of a retry: how many rows of each kind it took over from the passes before."""


def passes(folder: StoragePath) -> list[Pass]:
    """The passes that are planned in `folder`, in order."""
    found = (re.fullmatch(r"pass-(\d{1,9})\.json", name) for name in listing(folder))
    paths = [folder / f"pass-{number}.json" for number in sorted(int(match[1]) for match in found if match)]
    return [validated(Pass, documents.read_json(path), path) for path in paths]


def name(shard: int, digits: int) -> str:
    """A shard's name as img2dataset has it."""
    return f"{shard:0{digits}d}"


def plan_list(
    folder: StoragePath,
    sources: Sequence[Source],
    columns: Columns,
    size: int,
    digits: int,
    told: OnProgress = lambda _: None,
) -> Pass:
    """Split a list into shards of `size` rows; every file of it begins a new one, as in img2dataset.

    One table of `size` rows is in memory, however long the list is.
    """
    if any(source.form == "txt" for source in sources) and len(columns.wanted) > 1:
        raise DataError("a txt list has URLs alone; leave --caption-col and --save-additional-columns out")
    types: Types = {}
    while True:
        bad: list[str] = []
        try:
            pieces = (piece for source in sources for piece in _cut(source, columns, types, bad, size))
            shards, rows = _write(folder, pieces, 0, digits, told)
            break
        except Clash as clash:
            types[clash.column] = clash.wider
    if not rows:
        raise DataError(f"the list has no rows: {', '.join(source.url for source in sources[:3])}")
    return _planned(folder, Pass(number=0, first=0, shards=shards, rows=rows, unreadable=len(bad)))


def plan_retry(
    folder: StoragePath,
    before: Sequence[Pass],
    shards: StoragePath,
    columns: Columns,
    kinds: Sequence[str],
    size: int,
    digits: int,
) -> Pass | None:
    """Plan the rows that failed with one of `kinds` and were not tried again since; None where there are none.

    `shards` has the Parquets of all passes before, complete.
    """
    first = before[-1].first + before[-1].shards
    retried: Counter[str] = Counter()
    names = list(columns.wanted)
    tables = (failed_rows(shards, shard, before, kinds, names, digits, retried) for shard in range(first))
    count, rows = _write(folder, _rebatched(tables, size), first, digits, lambda _: None)
    if not rows:
        return None
    made = Pass(
        number=len(before), first=first, shards=count, rows=rows, kinds=tuple(sorted(kinds)), retried=dict(retried)
    )
    return _planned(folder, made)


def failed_rows(
    shards: StoragePath,
    shard: int,
    before: Sequence[Pass],
    kinds: Sequence[str],
    names: list[str],
    digits: int,
    retried: Counter[str],
) -> pa.Table:
    """The rows of one shard that are to be tried again, counted in `retried` by kind."""
    since = [later for later in before if later.first > shard]
    table = pq.read_table(table_source(shards / f"{name(shard, digits)}.parquet"), partitioning=None)
    if "captions" not in names and "captions" in table.column_names:  # all texts of images that came with several
        names = [*names[:-1], "captions", names[-1]]
    told = [kind_of(message or "") for message in table["error_message"].to_pylist()]
    wanted = [_names(kinds, kind) and not any(_names(later.kinds, kind) for later in since) for kind in told]
    retried.update(kind for kind, take in zip(told, wanted, strict=True) if take)
    return table.filter(pa.array(wanted, pa.bool_())).select(names)


def _names(kinds: Sequence[str], kind: str) -> bool:
    return bool(kind) and (kind in kinds or (EVERY in kinds and kind != "placeholder"))


def remove(folder: StoragePath) -> None:
    """Forget a plan that was never finished."""
    for path in folder.glob("*.parquet"):
        documents.unlink(path)


def _cut(source: Source, columns: Columns, types: Types, bad: list[str], size: int) -> Iterator[pa.Table]:
    own: list[str] = []
    yield from _rebatched(url_lists.tables(source, columns, types, own), size)
    bad.extend(own)


def _rebatched(tables: Iterator[pa.Table], size: int) -> Iterator[pa.Table]:
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


def _write(
    folder: StoragePath, pieces: Iterator[pa.Table], first: int, digits: int, told: OnProgress
) -> tuple[int, int]:
    shards = rows = 0
    for piece in pieces:
        if len(str(first + shards)) > digits:
            raise DataError(
                f"more than {10**digits} shards would be written, whose names have {digits} digits;"
                " take a larger --shard-size, or more digits by --oom-shard-count"
            )
        with atomic(folder / f"{name(first + shards, digits)}.parquet") as file:
            pq.write_table(piece.combine_chunks(), file, compression="zstd")
        shards, rows = shards + 1, rows + piece.num_rows
        told(rows)
    return shards, rows


def _planned(folder: StoragePath, made: Pass) -> Pass:
    write_json(folder / f"pass-{made.number}.json", made.model_dump(mode="json"))
    return made


def read(folder: StoragePath, shard: str) -> pa.Table:
    """The rows of one shard, in order."""
    return pq.read_table(table_source(folder / f"{shard}.parquet"), partitioning=None)
