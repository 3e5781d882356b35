"""The same bytes under many URLs: "image unavailable" pictures, counted by sha256 over all shards in bounded memory.

Hashes are counted by their first 64 bits, a slice of them at a time: one pass over one Parquet column writes each slice
into a file of its own, so that a billion need 8 GB of temporary disk and no second pass.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from capfilt.downloading.failures import PLACEHOLDER
from capfilt.downloading.finalize import shard_stats, tally_of, write_table, write_tar_without
from capfilt.runs.tally import Tally
from capfilt.storage import documents
from capfilt.storage.atomic import write_json
from capfilt.storage.paths import StoragePath, table_source

HASHES_IN_MEMORY = 20_000_000
"""Hashes in memory at a time: 160 MB, and as much again to sort them."""
Commit = Callable[[list[StoragePath], Tally], object]
"""Called with the files of a shard and their tally, to record the shard as done."""


def count_repeated(
    paths: Sequence[StoragePath], top: int, min_count: int = 0, in_memory: int = HASHES_IN_MEMORY
) -> Counter[str]:
    """Count, by sha256, the `top` most repeated pictures, and all that came `min_count` times or more (0: none).

    Pictures that were dropped as placeholders are counted too, so that counting again gives the same.

    Args:
        paths: the Parquets of all shards.
        in_memory: hashes to hold at a time.
    """
    total = sum(pq.read_metadata(table_source(path)).num_rows for path in paths)
    num_slices = max(1, -(-total // in_memory))
    with tempfile.TemporaryDirectory(prefix="capfilt-placeholders-") as folder:
        slices = _write_slices(paths, Path(folder), num_slices)
        suspects = np.sort(np.concatenate([_frequent_heads(path, top, min_count) for path in slices]))
    counts: Counter[str] = Counter()
    if len(suspects):
        for digests in _digests(paths):
            heads = _heads(digests)
            nearest = np.searchsorted(suspects, heads).clip(max=len(suspects) - 1)
            counts.update(digests.filter(pa.array(suspects[nearest] == heads)).to_pylist())
    best = dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:top])
    return Counter({digest: n for digest, n in counts.items() if n > 1 and (digest in best or 0 < min_count <= n)})


def drop(folder: StoragePath, shard: str, dropped: Counter[str], commit: Commit) -> int:
    """Turn the pictures of one shard whose sha256 is in `dropped` into failures; returns their number.

    Tar and Parquet are replaced, then committed anew. A kill in between makes the next run fetch the shard again.
    """
    tar, parquet, stats = (folder / f"{shard}{suffix}" for suffix in (".tar", ".parquet", "_stats.json"))
    table = pq.read_table(table_source(parquet), partitioning=None)
    hit = pc.and_(pc.equal(table["status"], "success"), pc.is_in(table["sha256"], pa.array(list(dropped), pa.string())))
    keys = set(table.filter(hit)["key"].to_pylist())
    if not keys:
        return 0
    with tar.open("rb") as old:
        write_tar_without(keys, old, tar)
    table = _marked(table, hit, dropped)
    write_table(parquet, table)
    tally = tally_of(table)
    write_json(stats, shard_stats(tally, table, documents.read_object(stats)))
    commit([tar, parquet, stats], tally)
    return len(keys)


def _marked(table: pa.Table, hit: pa.ChunkedArray, counts: Counter[str]) -> pa.Table:
    """The rows with those that are `hit` as failures."""
    columns = (hit.to_pylist(), table["sha256"].to_pylist(), table["error_message"].to_pylist())
    messages = [
        f"{PLACEHOLDER}: the same bytes under {counts[digest]} URLs" if is_hit else message
        for is_hit, digest, message in zip(*columns, strict=True)
    ]
    statuses = pc.if_else(hit, "failed_to_download", table["status"])
    table = table.set_column(table.column_names.index("status"), "status", statuses)
    return table.set_column(table.column_names.index("error_message"), "error_message", pa.array(messages))


def _write_slices(paths: Sequence[StoragePath], folder: Path, num_slices: int) -> list[Path]:
    """Write the first 64 bits of all hashes into files, equal ones into the same."""
    files = [folder / f"{part}" for part in range(num_slices)]
    with ExitStack() as stack:
        opened = [stack.enter_context(path.open("wb")) for path in files]
        for heads in map(_heads, _digests(paths)):
            parts = heads % num_slices
            for part, file in enumerate(opened):
                file.write(heads[parts == part].tobytes())
    return files


def _frequent_heads(path: Path, top: int, min_count: int) -> np.ndarray:
    """The first 64 bits, uint64 [n], of the hashes of one slice that may be among the most repeated."""
    values, counts = np.unique(np.fromfile(path, np.uint64), return_counts=True)
    values, counts = values[counts > 1], counts[counts > 1]
    bound = np.sort(counts)[-top] if len(counts) >= top else 2
    frequent = counts > bound if min_count == 0 or min_count > bound else counts >= min_count
    return np.union1d(values[frequent], values[np.argsort(-counts, kind="stable")[:top]])


def _digests(paths: Sequence[StoragePath]) -> Iterator[pa.Array]:
    for path in paths:
        for batch in pq.ParquetFile(table_source(path)).iter_batches(columns=["sha256"]):
            yield batch.column(0).drop_null()


def _heads(digests: pa.Array) -> np.ndarray:
    """The first 16 hex digits of each digest as an integer: uint64 [n]."""
    hex_digits = pc.utf8_slice_codeunits(digests, 0, 16).buffers()[2]
    text = b"" if hex_digits is None else hex_digits.to_pybytes()[: 16 * len(digests)]
    return np.frombuffer(bytes.fromhex(text.decode("ascii")), ">u8").astype(np.uint64)
