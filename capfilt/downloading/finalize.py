"""From what img2dataset wrote for a shard to what is committed: tar, Parquet and stats, keys in order, with a `uid`.

img2dataset writes samples as they arrive, with the time of day in every tar header. Here the same rows give the
same tar: members of a key adjacent, keys sorted, GNU format, no times.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from capfilt.downloading.column_types import CAPTIONS
from capfilt.downloading.failures import classified, kind_of
from capfilt.runs.tally import Tally
from capfilt.storage.atomic import atomic, write_json
from capfilt.storage.paths import StoragePath

SOURCE = "web"


class Spool:
    """Takes samples as webdataset's TarWriter does, and keeps their members' bytes in one file, in any order."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._at = 0
        self.members: dict[str, list[tuple[str, int, int]]] = {}
        """Of each key: extension, offset and size of its members."""

    def write(self, sample: Mapping[str, Any]) -> int:
        """Keep one sample; its members in the order in which webdataset would write them."""
        own = []
        for extension in sorted(name for name in sample if not name.startswith("__")):
            value = sample[extension]
            data = value.encode("utf-8", "replace") if isinstance(value, str) else value
            self._file.write(data)
            own.append((extension, self._at, len(data)))
            self._at += len(data)
        self.members[sample["__key__"]] = own
        return len(own)

    def close(self) -> None:
        """Nothing to end: the file is closed by whoever opened it."""


@dataclass
class Written:
    """What img2dataset has left in a folder of one shard."""

    folder: Path
    shard: str
    spool: Spool | None = field(default=None, repr=False)

    def path(self, suffix: str) -> Path:
        """One of its files."""
        return self.folder / f"{self.shard}{suffix}"


def settle(written: Written, rows: pa.Table, out: StoragePath, size: int) -> tuple[list[StoragePath], Tally]:
    """Write a shard's final files into `out`; returns them and what became of the rows.

    Args:
        rows: the plan of the shard, which every row is checked against.
        size: rows of a whole shard, from which img2dataset makes its keys.
    """
    table = _completed(written, rows, size)
    assert written.spool is not None, "a shard was fetched"
    lacking = set(table.filter(pa.compute.equal(table["status"], "success"))["key"].to_pylist())
    assert lacking == written.spool.members.keys(), "every success has its members"
    uids = None if "uid" in rows.column_names else _by_key(table, "uid")
    paths = [out / f"{written.shard}{suffix}" for suffix in (".tar", ".parquet", "_stats.json")]
    with written.path(".tar").open("rb") as spooled:
        write_tar(paths[0], spooled, written.spool.members, uids)
    write_table(paths[1], table)
    tally = tally_of(table)
    write_json(paths[2], stats(tally, table, json.loads(written.path("_stats.json").read_bytes())))
    return paths, tally


def write_tar(
    path: StoragePath,
    spooled: BinaryIO,
    members: Mapping[str, Sequence[tuple[str, int, int]]],
    uids: Mapping[str, str] | None,
) -> None:
    """Write the samples in the order of their keys; into each json goes its uid, unless they have their own (None)."""
    with atomic(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for key in sorted(members):
            for extension, offset, size in members[key]:
                spooled.seek(offset)
                data = spooled.read(size)
                if extension == "json" and uids is not None:
                    data = _with_uid(data, uids[key])
                _add(tar, f"{key}.{extension}", data)


def write_table(path: StoragePath, table: pa.Table) -> None:
    """Write a shard's rows; the same rows, the same bytes."""
    with atomic(path) as file:
        pq.write_table(table, file, compression="zstd")


def tally_of(table: pa.Table) -> Tally:
    """Count the rows of a shard: a success is kept, a failure counts by its kind."""
    tally = Tally.zero()
    statuses, messages = table["status"].to_pylist(), table["error_message"].to_pylist()
    for status, message in zip(statuses, messages, strict=True):
        kept = status == "success"
        tally.samples.update(["in", "kept" if kept else "failed"])
        if not kept:
            tally.failed[kind_of(message)] += 1
    if "caption" in table.column_names:
        texts = tally.samples["kept"]
        if "captions" in table.column_names and table.schema.field("captions").type == CAPTIONS:  # several of an image
            came = table.filter(pa.compute.equal(table["status"], "success"))
            texts = pa.compute.sum(pa.compute.list_value_length(came["captions"]), min_count=0).as_py()
        tally.texts["in"][SOURCE] = tally.texts["kept"][SOURCE] = texts
    return tally


def stats(tally: Tally, table: pa.Table, before: Mapping[str, Any]) -> dict[str, Any]:
    """img2dataset's stats of a shard, failures counted by kind; the times are those of `before`."""
    statuses = Counter(table["status"].to_pylist())
    times = {key: before[key] for key in ("duration", "start_time", "end_time")}
    counts = {
        "count": table.num_rows,
        "successes": statuses["success"],
        **{status: statuses[status] for status in ("failed_to_download", "failed_to_resize")},
    }
    return {**counts, **times, "status_dict": {"success": statuses["success"], **tally.failed}}


def _completed(written: Written, rows: pa.Table, size: int) -> pa.Table:
    """img2dataset's table in the order of keys, with a uid, a kind in front of every error, and every row there."""
    table = pq.read_table(written.path(".parquet"), partitioning=None)
    keys = _keys(written.shard, rows.num_rows, size)
    if table.num_rows < rows.num_rows:  # it prints a traceback and forgets the row
        table = pa.concat_tables([table, _lost(table.schema, rows, keys, set(table["key"].to_pylist()))])
    table = table.sort_by("key")
    assert table["key"].to_pylist() == keys, "img2dataset's keys are counted"
    messages = [
        None if status == "success" else classified(status, message)
        for status, message in zip(table["status"].to_pylist(), table["error_message"].to_pylist(), strict=True)
    ]
    table = table.set_column(
        table.column_names.index("error_message"), "error_message", pa.array(messages, pa.string())
    )
    if "uid" not in table.column_names:
        heads = [None if digest is None else digest[:32] for digest in table["sha256"].to_pylist()]
        table = table.append_column("uid", pa.array(heads, pa.string()))
    return table


def _keys(shard: str, count: int, size: int) -> list[str]:
    """img2dataset's keys: the shard's number and the row's, of fixed width."""
    digits = math.ceil(math.log10(size))
    return [f"{int(shard) * 10**digits + row:0{len(shard) + digits}d}" for row in range(count)]


def _lost(schema: pa.Schema, rows: pa.Table, keys: Sequence[str], there: set[str]) -> pa.Table:
    own = [
        {**values, "key": key, "status": "failed_to_download", "error_message": "lost: img2dataset gave no answer"}
        for key, values in zip(keys, rows.to_pylist(), strict=True)
        if key not in there
    ]
    return pa.Table.from_pylist(own, schema=schema)


def _by_key(table: pa.Table, column: str) -> dict[str, str]:
    return dict(zip(table["key"].to_pylist(), table[column].to_pylist(), strict=True))


def _with_uid(data: bytes, uid: str) -> bytes:
    """A json of img2dataset's with one key more; spliced in, since to write it all again takes longer than the tar."""
    end = b"\n}"
    assert data.endswith(end), "img2dataset indents its json by 4"
    return data.removesuffix(end) + f',\n    "uid": {json.dumps(uid)}'.encode() + end


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    header = tarfile.TarInfo(name)
    header.size = len(data)
    tar.addfile(header, io.BytesIO(data))


def without(source: IO[bytes], dropped: set[str], path: StoragePath) -> None:
    """Write a tar again, without some of its keys; everything else byte for byte."""
    with (
        tarfile.open(fileobj=source, mode="r|") as old,
        atomic(path) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as new,
    ):
        for member in old:
            if member.name.partition(".")[0] not in dropped:
                new.addfile(member, old.extractfile(member))
