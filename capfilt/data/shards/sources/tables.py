"""Tables with a picture in each row, read as shards: Parquet, the Arrow files of `datasets`, Lance.

A view is a run of whole row groups of 1,000 rows or more, or a part of one that has more than 10,000. Rows come one at
a time, so that a picture to which a million rows refer is in memory once. A row that has no `__key__` is known by its
file and number: `train-00000-00000012`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import fsspec
import pyarrow as pa

from capfilt.data.sample import FailedSample, Sample
from capfilt.data.shards.members import OF_A_FAULT, USED, MemberCounts
from capfilt.data.shards.sources import arrow, columns, lance, parquet, rows
from capfilt.data.shards.sources.columns import Columns
from capfilt.data.shards.sources.view import View, failed, version_of, views
from capfilt.errors import NoShardError

KIND = "rows"


class Format(Protocol):
    """A module that reads one kind of table."""

    def layout(self, location: str) -> tuple[pa.Schema, tuple[tuple[int, int], ...]]:
        """What a table has, by its footer: the schema, and the rows and bytes of each part that is read at a time."""

    def read(self, location: str, names: list[str], first: int, last: int) -> Iterator[pa.RecordBatch | str]:
        """The rows of a range, few at a time; instead of what cannot be read, why, and then the end."""


FORMATS: Mapping[str, Any] = {".parquet": parquet, ".pq": parquet, ".arrow": arrow, ".lance": lance}


def is_table(path: str) -> bool:
    """Whether a path is a table, by its name; `_metadata` and what a Mac writes beside each file are none."""
    return path.rstrip("/").endswith(tuple(FORMATS)) and not path.rpartition("/")[2].startswith((".", "_"))


def holds_pictures(location: str) -> bool:
    """Whether a table has a column of pictures; else it says something of files beside it."""
    with suppress(NoShardError):
        columns.choose(location, _format(location).layout(location)[0], {"text": ""})
        return True
    return False


def expand(location: str, options: Mapping[str, str]) -> list[str]:
    """The views of a table. NoShardError where it holds no pictures; ShardError where it cannot be read."""
    schema, groups = _format(location).layout(location)
    columns.choose(location, schema, options)
    return views(location, KIND, (count for count, _ in groups), options)


def stat(view: View) -> dict[str, Any]:
    """As `shards.stat`: the view's share of the bytes of its row groups, and the version of the file."""
    size = start = 0
    for count, num_bytes in _format(view.location).layout(view.location)[1]:
        inside = min(view.last + 1, start + count) - max(view.first, start)
        size += num_bytes * inside // count if inside > 0 else 0
        start += count
    if _format(view.location) is lance:  # a version is a file of its folder; of its bytes nothing is known
        return {"size": None, "version": lance.version(view.location)}
    files, path = fsspec.core.url_to_fs(view.location)
    info = files.info(path)
    return {"size": size, "version": f"{info.get('size')} {version_of(info)}"}


def read(view: View, counts: MemberCounts) -> Iterator[Sample | FailedSample]:
    """The samples of a view, an outcome for every row."""
    form = _format(view.location)
    chosen = columns.choose(view.location, form.layout(view.location)[0], view.options)
    stem, number, seen = Path(view.location.rstrip("/")).stem, view.first, set[str]()
    batches = form.read(view.location, chosen.all, view.first, view.last)
    for batch in chain(batches, ["the table ends before this row"]):
        count = view.last + 1 - number if isinstance(batch, str) else batch.num_rows
        for place in range(count):
            key = f"{stem}-{number + place:08d}"
            item = failed(key, batch) if isinstance(batch, str) else _sample(key, batch, place, chosen, seen)
            counts.update(["in", USED if isinstance(item, Sample) else OF_A_FAULT])
            yield item
        number += count


def _sample(key: str, batch: pa.RecordBatch, place: int, chosen: Columns, seen: set[str]) -> Sample | FailedSample:
    try:
        cell: Any = batch.column(chosen.image)[place].as_py()
        texts = batch.column(chosen.text)[place].as_py() if chosen.text else None
        meta = {name: batch.column(name)[place].as_py() for name in chosen.meta}
    except UnicodeDecodeError:
        return failed(key, "text is not UTF-8")
    image = cell.get("bytes") if isinstance(cell, dict) else cell
    if not image and isinstance(cell, dict) and cell.get("path"):
        return failed(key, "no image: the table has its path and not its bytes")
    given = meta.pop("__key__", None)
    row = rows.Row(rows.texts_of(texts), meta=rows.meta_of(meta))
    return rows.make(given if isinstance(given, str) and given else key, image, row, seen)


def _format(location: str) -> Format:
    found: Format = next(module for suffix, module in FORMATS.items() if location.rstrip("/").endswith(suffix))
    return found
