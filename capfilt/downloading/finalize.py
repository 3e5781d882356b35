"""From what img2dataset wrote for a shard to what is committed: tar, Parquet and stats, keys in order, with a `uid`.

img2dataset writes samples as they arrive, with the time of day in every tar header. Here the same rows give the same
tar: members of a key adjacent, keys sorted, GNU format, no times.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from capfilt.downloading.failures import kind_of, with_kind
from capfilt.downloading.plans import ShardLayout
from capfilt.downloading.url_lists.column_types import CAPTIONS
from capfilt.runs.tally import Tally
from capfilt.storage.atomic import atomic, write_json
from capfilt.storage.paths import StoragePath

SOURCE = "web"
Members = dict[str, list[tuple[str, int, int]]]
"""Of each key: extension, offset and size in bytes of its members."""


class MemberSpool:
    """Takes samples as webdataset's TarWriter does, and keeps their members' bytes in one file, in any order."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._position = 0
        self.members: Members = {}

    def write(self, sample: Mapping[str, Any]) -> int:
        """Keep one sample, its members in webdataset's order; returns their number."""
        members = []
        for extension in sorted(name for name in sample if not name.startswith("__")):
            value = sample[extension]
            data = value.encode("utf-8", "replace") if isinstance(value, str) else value
            self._file.write(data)
            members.append((extension, self._position, len(data)))
            self._position += len(data)
        self.members[sample["__key__"]] = members
        return len(members)

    def close(self) -> None:
        """Do nothing: img2dataset closes the file that it opened."""


@dataclass
class RawShard:
    """The files of one shard as img2dataset leaves them in `folder`."""

    folder: Path
    name: str
    spool: MemberSpool | None = field(default=None, repr=False)
    """None until img2dataset has opened its writer."""

    def path(self, suffix: str) -> Path:
        return self.folder / f"{self.name}{suffix}"


def finalize(raw: RawShard, rows: pa.Table, out: StoragePath, layout: ShardLayout) -> tuple[list[StoragePath], Tally]:
    """Write a shard's tar, Parquet and stats into `out`; returns their paths and what became of the rows.

    `rows`: the plan of the shard; each of them has one row in the Parquet.
    """
    table = _complete_table(raw, rows, layout)
    assert raw.spool is not None, "a shard was fetched"
    successes = set(table.filter(pa.compute.equal(table["status"], "success"))["key"].to_pylist())
    assert successes == raw.spool.members.keys(), "every success has its members"
    uids = None
    if "uid" not in rows.column_names:
        uids = dict(zip(table["key"].to_pylist(), table["uid"].to_pylist(), strict=True))
    paths = [out / f"{raw.name}{suffix}" for suffix in (".tar", ".parquet", "_stats.json")]
    tally = tally_of(table)
    stats = shard_stats(tally, table, json.loads(raw.path("_stats.json").read_bytes()))
    # Each file waits for the disk; what they read is closed after they have ended, on Ctrl-C too.
    with raw.path(".tar").open("rb") as spooled, ThreadPoolExecutor(3) as pool:
        written = [
            pool.submit(write_tar, paths[0], spooled, raw.spool.members, uids),
            pool.submit(write_table, paths[1], table),
            pool.submit(write_json, paths[2], stats),
        ]
        for future in written:
            future.result()
    return paths, tally


def write_tar(path: StoragePath, spooled: BinaryIO, members: Members, uids: Mapping[str, str] | None) -> None:
    """Write samples in the order of their keys.

    `uids`: the uid of each key, which goes into its json; None where the jsons have uids from the list.
    """
    with atomic(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for key in sorted(members):
            for extension, offset, size in members[key]:
                spooled.seek(offset)
                data = spooled.read(size)
                if extension == "json" and uids is not None:
                    data = _with_uid(data, uids[key])
                header = tarfile.TarInfo(f"{key}.{extension}")
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))


def write_tar_without(keys: set[str], source: IO[bytes], path: StoragePath) -> None:
    """Write the tar `source` again to `path`, without these keys; everything else byte for byte."""
    with (
        tarfile.open(fileobj=source, mode="r|") as old,
        atomic(path) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as new,
    ):
        for member in old:
            if member.name.partition(".")[0] not in keys:
                new.addfile(member, old.extractfile(member))


def write_table(path: StoragePath, table: pa.Table) -> None:
    """Write a shard's rows as Parquet; the same rows give the same bytes."""
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
        num_texts = tally.samples["kept"]
        # `captions` of another type is a column of the list's own.
        if "captions" in table.column_names and table.schema.field("captions").type == CAPTIONS:
            kept_rows = table.filter(pa.compute.equal(table["status"], "success"))
            num_texts = pa.compute.sum(pa.compute.list_value_length(kept_rows["captions"]), min_count=0).as_py()
        tally.texts["in"][SOURCE] = tally.texts["kept"][SOURCE] = num_texts
    return tally


def shard_stats(tally: Tally, table: pa.Table, before: Mapping[str, Any]) -> dict[str, Any]:
    """img2dataset's stats of a shard, with failures counted by kind; the times are those of `before`."""
    statuses = Counter(table["status"].to_pylist())
    times = {key: before[key] for key in ("duration", "start_time", "end_time")}
    counts = {
        "count": table.num_rows,
        "successes": statuses["success"],
        **{status: statuses[status] for status in ("failed_to_download", "failed_to_resize")},
    }
    return {**counts, **times, "status_dict": {"success": statuses["success"], **tally.failed}}


def _complete_table(raw: RawShard, rows: pa.Table, layout: ShardLayout) -> pa.Table:
    """img2dataset's Parquet in the order of keys, with every planned row, a uid, and a kind in front of every error."""
    table = pq.read_table(raw.path(".parquet"), partitioning=None)
    keys = _keys(raw.name, rows.num_rows, layout)
    if table.num_rows < rows.num_rows:  # img2dataset prints a traceback and drops the row
        table = pa.concat_tables([table, _lost_rows(table, rows, keys)])
    table = table.sort_by("key")
    assert table["key"].to_pylist() == keys, "img2dataset's keys are counted"
    messages = [
        None if status == "success" else with_kind(status, message)
        for status, message in zip(table["status"].to_pylist(), table["error_message"].to_pylist(), strict=True)
    ]
    table = table.set_column(
        table.column_names.index("error_message"), "error_message", pa.array(messages, pa.string())
    )
    if "uid" not in table.column_names:
        uids = [None if digest is None else digest[:32] for digest in table["sha256"].to_pylist()]
        table = table.append_column("uid", pa.array(uids, pa.string()))
    return table


def _keys(name: str, count: int, layout: ShardLayout) -> list[str]:
    """img2dataset's keys: the shard's number and the row's, of fixed width."""
    digits = math.ceil(math.log10(layout.size))
    return [f"{int(name) * 10**digits + row:0{len(name) + digits}d}" for row in range(count)]


def _lost_rows(table: pa.Table, rows: pa.Table, keys: Sequence[str]) -> pa.Table:
    """The planned rows that `table` lacks, as failures."""
    present = set(table["key"].to_pylist())
    lost = [
        {**values, "key": key, "status": "failed_to_download", "error_message": "lost: img2dataset gave no answer"}
        for key, values in zip(keys, rows.to_pylist(), strict=True)
        if key not in present
    ]
    return pa.Table.from_pylist(lost, schema=table.schema)


def _with_uid(data: bytes, uid: str) -> bytes:
    """img2dataset's json with a uid spliced in: to write all of it again takes longer than to write the tar."""
    end = b"\n}"
    assert data.endswith(end), "img2dataset indents its json by 4"
    return data.removesuffix(end) + f',\n    "uid": {json.dumps(uid)}'.encode() + end
