"""Which shards of a stage have an image of a key, uid or sha256: so `explain` opens a few tables of a million.

The workers write it when a stage of many shards ends, in parts: `ledger/STAGE.images-N` has the shards of a part, and
sorted 64-bit hashes of all names in them, 12 bytes a name, of which a look-up reads some hundred. Equal hashes cost a
table that is opened in vain; so does an entry that is out of date, and shards in no part are opened as before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from capfilt.cluster.session import Session
from capfilt.cluster.worker_pool import Resources, run_items
from capfilt.config import Config
from capfilt.data import parquet
from capfilt.errors import RunError
from capfilt.runs.ledger import Ledger
from capfilt.runs.progress import Progress
from capfilt.storage import documents, safe_paths
from capfilt.storage.atomic import atomic
from capfilt.storage.paths import StoragePath, listing, map_concurrent, remove_file
from capfilt.storage.remote_path import RemotePath

NAMES = ("key", "uid", "sha256")
"""The columns that identify an image."""
LEAST = 500
"""Shards without an entry from which a part is written."""
BLOCK = 5_000
"""Shards of a part: with 1,000 images each 10 million names, 120 MB."""
HASHED = 64
"""Bytes of a name that its hash is of, beside its length."""
_PER_BUCKET = 256  # entries between two offsets
_SUFFIX = re.compile(r"\.images-(\d{1,9})")


def hashes(names: pa.ChunkedArray) -> np.ndarray:
    """64-bit hashes of texts, [n], for all of them at once: FNV-1a, mixed at the end as in splitmix64."""
    column = names.combine_chunks().cast(pa.large_binary())
    offsets = np.frombuffer(column.buffers()[1], np.int64)[column.offset : column.offset + len(column) + 1]
    data = np.frombuffer(column.buffers()[2] or b"", np.uint8)
    starts, lengths = offsets[:-1], np.diff(offsets)
    result = lengths.astype(np.uint64) ^ np.uint64(0xCBF29CE484222325)
    for position in range(min(HASHED, int(lengths.max(initial=0)))):
        here = lengths > position
        result[here] = (result[here] ^ data[starts[here] + position]) * np.uint64(0x100000001B3)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        result = (result ^ (result >> np.uint64(shift))) * np.uint64(factor)
    return result ^ (result >> np.uint64(31))


class IndexJob(Config):
    """Writes parts; an item is a part's number and its shards, with "/" between them."""

    name: ClassVar[str] = "image-index"  # of its workers
    unit: ClassVar[str] = "parts"

    out: StoragePath
    stage: str

    def open(self) -> Callable[[str], int]:
        """Nothing to load."""
        return self.write

    def write(self, item: str) -> int:
        """Write a part; returns how many names it has."""
        number, *shards = item.split("/")
        ledger = Ledger(self.out, self.stage)
        found = [np.unique(np.concatenate([np.zeros(0, np.uint64), *_of_shard(ledger, shard)])) for shard in shards]
        values = np.concatenate(found)
        order = np.argsort(values, kind="stable")
        values, of = values[order], np.repeat(np.arange(len(shards), dtype=np.uint32), list(map(len, found)))[order]
        bits = max(0, (len(values) // _PER_BUCKET).bit_length())
        edges = np.searchsorted(values >> np.uint64(64 - bits), np.arange(2**bits + 1)) if bits else [0, len(values)]
        head = {"shards": shards, "names": len(values), "bits": bits}
        with atomic(_part(ledger, int(number))) as file:
            file.write(json.dumps(head, ensure_ascii=False).encode() + b"\n")
            for part in (np.asarray(edges, np.uint64), values, of):
                file.write(part.tobytes())
        return len(values)


def _of_shard(ledger: Ledger, shard: str) -> Iterator[np.ndarray]:
    """The hashes of all names in the tables that a stage committed for a shard."""
    done = ledger.read(ledger.path / f"{shard}.json")
    for output in done.outputs if done is not None else ():
        if output.path.endswith(".parquet"):
            path = ledger.folder / output.path
            columns = parquet.schema(path).names
            table = parquet.read(path, [name for name in NAMES if name in columns])
            if {"uid", "sha256"} <= set(table.column_names):  # a uid is mostly the first half of the sha256
                other = pc.not_equal(pc.utf8_slice_codeunits(table["sha256"], 0, 32), table["uid"])
                yield hashes(table["sha256"].filter(pc.fill_null(other, True)).drop_null())
            for name in {"key", "uid"} & set(table.column_names):
                yield hashes(table[name].drop_null())


def _part(ledger: Ledger, number: int) -> StoragePath:
    return ledger.path.with_name(f"{ledger.stage}.images-{number}")


def _parts(ledger: Ledger) -> list[int]:
    """The numbers of the parts that there are, ascending."""
    endings = (name.removeprefix(ledger.stage) for name in listing(ledger.path.parent) if name.startswith(ledger.stage))
    return sorted(int(match[1]) for ending in endings if (match := _SUFFIX.fullmatch(ending)))


def begin(ledger: Ledger, todo: Sequence[str]) -> None:
    """Remove the index where shards that it has are done again: other images may come into them."""
    if not _listed(ledger).isdisjoint(todo):
        _remove(ledger)


def _listed(ledger: Ledger) -> set[str]:
    """The shards that the index has. One with a damaged part is removed: it is made of the tables again."""
    try:
        return {shard for number in _parts(ledger) for shard in _Part(ledger, number).shards}
    except RunError:
        _remove(ledger)
        return set()


def _remove(ledger: Ledger) -> None:
    for number in _parts(ledger):
        remove_file(_part(ledger, number))


def extend(session: Session, ledger: Ledger, resources: Resources, show: Progress) -> None:
    """Write parts for the shards that have no entry, where they are many. One that cannot be written is told of, and
    the stage is done none the less."""
    missing = sorted(ledger.recorded_shards() - _listed(ledger))
    if len(missing) < LEAST:
        return
    numbers = _parts(ledger)
    first = numbers[-1] + 1 if numbers else 0
    blocks = [missing[start : start + BLOCK] for start in range(0, len(missing), BLOCK)]
    items = ["/".join((str(first + number), *block)) for number, block in enumerate(blocks)]
    job = IndexJob(out=ledger.folder.absolute(), stage=ledger.stage)
    with show.stage("index of images", len(items), job.unit) as line:
        for done, end in enumerate(run_items(session, job, items, resources), 1):
            if end.error is not None:
                show.say(f"without a part of its index `explain` opens up to {BLOCK} tables more: {end.error}")
            line.update(done)


def shards_with(ledger: Ledger, name: str) -> tuple[set[str], set[str]] | None:
    """The shards that may have an image of this name, and all that were looked through; None without an index.

    RunError for a part that is damaged.
    """
    numbers = _parts(ledger)
    if not numbers:
        return None
    forms = {name, name.lower(), name.lower()[:32] if len(name) == 64 else name}
    wanted = hashes(pa.chunked_array([pa.array(sorted(forms), pa.string())]))

    def look(number: int) -> tuple[list[str], list[str]]:
        part = _Part(ledger, number)
        return [part.shards[i] for value in wanted for i in part.find(value)], part.shards

    looked = list(map_concurrent(look, numbers, isinstance(ledger.path, RemotePath)))
    return {shard for hits, _ in looked for shard in hits}, {shard for _, shards in looked for shard in shards}


class _Part:
    """A part as it lies on disk: a line of JSON, then edges of buckets, hashes, and the shard of each."""

    def __init__(self, ledger: Ledger, number: int):
        self._path = _part(ledger, number)
        with self._open() as file:
            line = file.readline(documents.RECORD_BYTES)
            try:
                head: Mapping[str, Any] = documents.parse(line)
                shards, self._num, bits = head["shards"], int(head["names"]), int(head["bits"])
                if not isinstance(shards, list) or not 0 <= bits <= 40:
                    raise TypeError("its head")
                self.shards = [safe_paths.check_file_name(shard) for shard in shards]
            except (ValueError, TypeError, KeyError) as error:
                raise self._damaged(error) from error
        self._bits, self._start = bits, len(line)

    def find(self, value: np.uint64) -> Iterator[int]:
        """The positions of the shards with this hash."""
        bucket = int(value) >> (64 - self._bits) if self._bits else 0
        at = self._start + 8 * (2**self._bits + 1)
        with self._open() as file:
            low, high = (int(edge) for edge in self._read(file, self._start + 8 * bucket, 2, np.uint64))
            if not low <= high <= self._num:
                raise self._damaged(f"bucket {bucket}")
            values = self._read(file, at + 8 * low, high - low, np.uint64)
            of = self._read(file, at + 8 * self._num + 4 * low, high - low, np.uint32)
        found = of[values == value]
        if len(found) and int(found.max()) >= len(self.shards):
            raise self._damaged(f"bucket {bucket}")
        yield from map(int, found)

    def _open(self) -> BinaryIO:
        return self._path.open("rb") if isinstance(self._path, RemotePath) else safe_paths.open_file(self._path)

    def _read(self, file: BinaryIO, position: int, count: int, kind: Any) -> np.ndarray:
        size = count * np.dtype(kind).itemsize
        if size > documents.PLAN_BYTES:
            raise self._damaged("a bucket is too large")
        file.seek(position)
        data = file.read(size)
        if len(data) != size:
            raise self._damaged("it is cut short")
        return np.frombuffer(data, kind)

    def _damaged(self, why: object) -> RunError:
        return RunError(f"{self._path} cannot be read ({why}); remove it: `explain` then opens more tables.")
