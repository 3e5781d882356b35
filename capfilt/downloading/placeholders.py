"""The same bytes under many URLs: "image unavailable" pictures, counted by sha256 over all shards in bounded memory.

Hashes are counted by their first 64 bits, a slice of them at a time, so that a hundred million need a few passes over
one Parquet column and not ten gigabytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from capfilt.downloading.finalize import stats, tally_of, without, write_table
from capfilt.runs.tally import Tally
from capfilt.storage.atomic import write_json
from capfilt.storage.paths import StoragePath, table_source

AT_ONCE = 20_000_000
"""Hashes in memory at a time: 160 MB, and as much again to sort them."""
KIND = "placeholder"


def repeated(paths: Sequence[StoragePath], top: int, least: int = 0, at_once: int = AT_ONCE) -> Counter[str]:
    """The sha256 of the `top` most repeated pictures, and of all that came `least` times or more; with their counts.

    Pictures that were dropped as placeholders are counted too, so that another count says the same.
    """
    total = sum(pq.read_metadata(table_source(path)).num_rows for path in paths)
    slices = max(1, -(-total // at_once))
    suspects = np.sort(np.concatenate([_frequent(paths, top, least, part, slices) for part in range(slices)]))
    found: Counter[str] = Counter()
    if len(suspects):
        for digests in _digests(paths):
            heads = _heads(digests)
            at = np.searchsorted(suspects, heads).clip(max=len(suspects) - 1)
            found.update(digests.filter(pa.array(suspects[at] == heads)).to_pylist())
    best = dict(sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))[:top])
    return Counter({digest: n for digest, n in found.items() if n > 1 and (digest in best or 0 < least <= n)})


def drop(
    folder: StoragePath, shard: str, dropped: Counter[str], commit: Callable[[list[StoragePath], Tally], object]
) -> int:
    """Turn the pictures of one shard that are among `dropped` into failures; returns how many these were.

    Tar and Parquet are replaced, then committed anew. A kill between makes the next run fetch the shard again.
    """
    tar, parquet = folder / f"{shard}.tar", folder / f"{shard}.parquet"
    table = pq.read_table(table_source(parquet), partitioning=None)
    hit = pc.and_(pc.equal(table["status"], "success"), pc.is_in(table["sha256"], pa.array(list(dropped), pa.string())))
    keys = set(table.filter(hit)["key"].to_pylist())
    if not keys:
        return 0
    messages = [
        f"{KIND}: the same bytes under {dropped[digest]} URLs" if key in keys else message
        for key, digest, message in zip(
            *(table[name].to_pylist() for name in ("key", "sha256", "error_message")), strict=True
        )
    ]
    statuses = pc.if_else(hit, "failed_to_download", table["status"])
    table = table.set_column(table.column_names.index("status"), "status", statuses)
    table = table.set_column(table.column_names.index("error_message"), "error_message", pa.array(messages))
    with tar.open("rb") as old:
        without(old, keys, tar)
    write_table(parquet, table)
    told, tally = folder / f"{shard}_stats.json", tally_of(table)
    write_json(told, stats(tally, table, json.loads(told.read_bytes())))
    commit([tar, parquet, told], tally)
    return len(keys)


def _frequent(paths: Sequence[StoragePath], top: int, least: int, part: int, slices: int) -> np.ndarray:
    """The first 64 bits of the hashes of one slice that may be asked for."""
    heads = [heads[heads % slices == part] for heads in map(_heads, _digests(paths))]
    values, counts = np.unique(np.concatenate(heads) if heads else np.empty(0, np.uint64), return_counts=True)
    values, counts = values[counts > 1], counts[counts > 1]
    bound = np.sort(counts)[-top] if len(counts) >= top else 2
    asked = counts > bound if least == 0 or least > bound else counts >= least
    return np.union1d(values[asked], values[np.argsort(-counts, kind="stable")[:top]])


def _digests(paths: Sequence[StoragePath]) -> Iterator[pa.Array]:
    for path in paths:
        for batch in pq.ParquetFile(table_source(path)).iter_batches(columns=["sha256"]):
            yield batch.column(0).drop_null()


def _heads(digests: pa.Array) -> np.ndarray:
    """The first 16 hex digits of each as an integer: [n] of uint64."""
    text = "".join(digest[:16] for digest in digests.to_pylist())
    return np.frombuffer(bytes.fromhex(text), ">u8").astype(np.uint64)
