"""How long near pairs take, of vectors and of hashes, against comparing everything; and what recall is reached.

    python benchmarks/index.py vectors --rows 100000 --dim 256 --flat 0.1
    python benchmarks/index.py hashes --rows 1000000 --bits 3 --multihash 0.1
    python benchmarks/index.py vectors --rows 10000000 --dim 64 --pool /scratch/pool --workers 2

The pool is random: unit vectors around 2,000 centres and random hashes, and in every shard but the first a tenth of the
rows are near-copies of rows of the shard before, within the radius. Seconds are of the clock and of the CPU, all
processes together: on a shared machine only the latter say something. `--flat` and `--multihash` are the share of the
queries that faiss compares with everything (`IndexFlatIP.range_search`) or looks up in hash maps
(`IndexBinaryMultiHash`); its seconds are divided by that share.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from capfilt.cluster.session import connect
from capfilt.cluster.worker_pool import Resources
from capfilt.data import embeddings
from capfilt.index import hamming
from capfilt.index.leaders import greedy_leaders
from capfilt.index.near import parse_near
from capfilt.runs.progress import Progress
from capfilt.stages.near.pairs import find_near_pairs

CENTRES, COPIES = 2000, 0.1
NOISE = 0.28  # of a copy, at most: cosines of 0.963 and more


class Clock:
    """Seconds of the clock and of the CPU, of this process and of those that it has waited for."""

    def __init__(self) -> None:
        self.begun = time.monotonic(), self._cpu()

    def __str__(self) -> str:
        return f"{time.monotonic() - self.begun[0]:8.1f} s, {self._cpu() - self.begun[1]:8.1f} s of CPU"

    @property
    def cpu(self) -> float:
        """Seconds of CPU so far."""
        return self._cpu() - self.begun[1]

    def _cpu(self) -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(one.ru_utime + one.ru_stime for one in used)


def unit(vectors: np.ndarray) -> np.ndarray:
    """float32 vectors of length 1."""
    scaled: np.ndarray = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return scaled


def make_pool(folder: Path, rows: int, dim: int, shard_rows: int) -> np.ndarray:
    """Write the tables of a pool; returns the planted pairs, int64 [2, P]."""
    (folder / embeddings.FOLDER).mkdir(parents=True)
    schema = embeddings.Vectors("clip", "m" * 64, dim).schema
    draw = np.random.default_rng(0)
    centres, before, planted = draw.standard_normal((CENTRES, dim)), None, []
    for first in range(0, rows, shard_rows):
        num = min(shard_rows, rows - first)
        vectors = unit(centres[draw.integers(0, CENTRES, num)] + draw.standard_normal((num, dim)))
        if before is not None:
            copies = draw.choice(num, int(num * COPIES), replace=False)
            sources = draw.integers(0, len(before), len(copies))
            noise = unit(draw.standard_normal((len(copies), dim))) * draw.random((len(copies), 1)) * NOISE
            vectors[copies] = unit(before[sources] + noise)
            planted.append(np.stack([first - len(before) + sources, first + copies]))
        before = vectors
        numbers = range(first, first + num)
        texts = [pa.array([f"{number:0{width}x}" for number in numbers]) for width in (9, 32, 64)]
        phash, side = pa.array(draw.integers(0, 2**64, num, dtype=np.uint64)), pa.array(np.full(num, 256, np.int32))
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.astype(np.float16).ravel()), dim)
        table = pa.Table.from_arrays([*texts, phash, side, side, column], schema=schema)
        pq.write_table(table, folder / embeddings.FOLDER / f"{first // shard_rows:05d}.parquet", use_dictionary=False)
    return np.concatenate(planted, axis=1)


def vectors(rows: int, dim: int, flat: float, pool: Path | None, workers: int) -> None:
    """Near pairs of vectors, the leaders among them, and what of the planted copies is found."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = pool or Path(scratch) / "pool"
        if not folder.is_dir():
            np.save(Path(scratch) / "planted.npy", planted := make_pool(folder, rows, dim, min(rows // 10, 100_000)))
            (Path(scratch) / "planted.npy").rename(folder / "planted.npy")
        planted, clock = np.load(folder / "planted.npy"), Clock()
        address = "start" if workers > 1 else "local"
        with connect(address) as session:
            needs = Resources(workers=workers if workers > 1 else 0)
            found = find_near_pairs(
                session, folder, Path(scratch) / "out", parse_near("vector:0.95"), needs, Progress()
            )
        print(f"{rows:,} x {dim}: near pairs {clock}; {found.recall}")
        joined = clock.cpu
        ends = np.concatenate([a << 32 | b for a, b, _ in found.of("vector")])
        print(
            f"planted copies found: {np.isin(planted[0] << 32 | planted[1], ends).mean():.5f} of {planted.shape[1]:,}"
        )
        clock = Clock()
        kept = greedy_leaders(np.arange(rows), found, found.kinds).kept
        print(f"leaders {clock}; {kept.sum():,} of {rows:,} stay; {_memory()}")
        if flat:
            print(f"flat self-join: {flat_join(folder, dim, flat, joined)}")


def flat_join(folder: Path, dim: int, share: float, joined: float) -> str:
    """faiss's range search of a share of the rows among all."""
    tables = embeddings.tables(folder).values()
    everything = np.concatenate([embeddings.matrix(embeddings.read(path)) for path in tables]).astype(np.float32)
    index: Any = faiss.IndexFlatIP(dim)
    index.add(everything)
    queries = everything[:: round(1 / share)]
    clock = Clock()
    index.range_search(np.ascontiguousarray(queries), 0.95)
    seconds = clock.cpu * len(everything) / len(queries)
    return f"{len(queries):,} queries {clock}; all: {seconds:.1f} s of CPU, {seconds / joined:.1f} times as much"


def hashes(rows: int, bits: int, multihash: float) -> None:
    """Near pairs of hashes in memory; a tenth are others with up to `bits` bits flipped."""
    draw = np.random.default_rng(0)
    values = draw.integers(0, 2**64, rows, dtype=np.uint64)
    copies, sources = draw.permutation(rows)[: rows // 5].reshape(2, -1)
    values[copies] = values[sources]
    for flip in range(bits):
        chosen = copies[draw.integers(0, bits + 1, len(copies)) > flip]
        values[chosen] ^= np.uint64(1) << draw.integers(0, 64, len(chosen)).astype(np.uint64)
    clock = Clock()
    pairs = hamming.near_pairs(values, np.arange(rows), bits)
    print(f"{rows:,} hashes within {bits} bits: {len(pairs.a):,} pairs {clock}; {_memory()}")
    hit = np.isin(np.minimum(copies, sources) << 32 | np.maximum(copies, sources), pairs.a << 32 | pairs.b)
    print(f"planted copies found: {hit.mean():.6f} of {len(copies):,}")
    if multihash:
        index: Any = faiss.IndexBinaryMultiHash(64, 4, 16)
        clock = Clock()
        as_bytes = values.view(np.uint8).reshape(-1, 8)
        index.add(as_bytes)
        queries = np.ascontiguousarray(as_bytes[:: round(1 / multihash)])
        built = clock.cpu
        index.range_search(queries, bits + 1)
        seconds = built + (clock.cpu - built) * rows / len(queries)
        print(
            f"IndexBinaryMultiHash(64, 4, 16), nflip 0: {len(queries):,} queries {clock}; all: {seconds:.1f} s of CPU"
        )


def _memory() -> str:
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("vectors", "hashes"))
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--flat", type=float, default=0)
    parser.add_argument("--multihash", type=float, default=0)
    parser.add_argument("--pool", type=Path, help="where the tables are, or are written: 1.6 GB for 10M x 64")
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    if given.what == "hashes":
        hashes(given.rows, given.bits, given.multihash)
    else:
        vectors(given.rows, given.dim, given.flat, given.pool, given.workers)


if __name__ == "__main__":
    main()
