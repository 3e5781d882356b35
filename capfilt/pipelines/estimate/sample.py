"""The sample as shards of its own, which the real stages then read, and what became of each picture in them.

The pieces are mixtures of the drawn shards, of a size between a batch and a shard: so each is an independent
measurement of the time of an image, with full batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pyarrow.parquet as pq

from capfilt.data import shards
from capfilt.data.sample import FailedSample, Sample
from capfilt.data.shards.keys import tar_key
from capfilt.data.survey import Draw
from capfilt.errors import DataError, RunError
from capfilt.runs.tally import NO_TEXT
from capfilt.storage import documents
from capfilt.storage.atomic import write_json
from capfilt.storage.paths import StoragePath, make_folder, remove_folder, table_source

RECORD, SHARDS = "sample.json", "sample"
PIECES = 8
"""At least, where the sample has as many batches."""


def find(out: StoragePath, asked: dict[str, Any]) -> dict[str, Any] | None:
    """The record of the sample that lies in a folder; None for none. RunError for one that was drawn otherwise."""
    path = out / RECORD
    record = documents.read_object(path) if path.is_file() else {"asked": asked}
    if record.get("asked") != asked:
        raise RunError(f"{out} holds the estimate of other data, sample or seed; give another --out, or remove it.")
    return record if "pieces" in record else None


def write(out: StoragePath, drawn: Draw, batch: int, workers: int, asked: dict[str, Any]) -> dict[str, Any]:
    """Write the readable samples as shards below `out` and, as the last act, the record of the draw.

    Raises:
        DataError: nothing that was drawn can be read.
    """
    readable = [(url, item) for url, item in drawn.items if isinstance(item, Sample)]
    failed = [(url, item.reason) for url, item in drawn.items if isinstance(item, FailedSample)]
    if not readable:
        why = failed[0][1] if failed else "no sample is in it"
        raise DataError(f"nothing of {len(drawn.urls)} shards (first {drawn.urls[0]}) can be read: {why}.")
    size = piece_size(len(readable), drawn.num_samples / len(drawn.urls), batch, workers)
    remove_folder(out / SHARDS)
    make_folder(out / SHARDS)
    keys: dict[str, str] = {}
    pieces: dict[str, int] = {}
    for start in range(0, len(readable), size):
        piece = []
        for url, item in readable[start : start + size]:
            key = item.key if tar_key(item.key) not in keys else f"{shards.name(url)}-{item.key}"
            keys[tar_key(key)] = url
            piece.append(replace(item, key=key))
        name = f"{len(pieces):05d}"
        pieces[name] = shards.write(out / SHARDS / f"{name}.tar", piece)
    sizes = {url: drawn.sizes.get(url, 1) for url in drawn.counts}
    known = {"is_census": drawn.is_census, "samples": drawn.num_samples, "bytes": drawn.num_bytes}
    record: dict[str, Any] = {
        "asked": asked,
        "shards": len(drawn.urls),
        "counts": drawn.counts,
        "sizes": sizes,
        **known,
    }
    record |= {"drawn": len(drawn.items), "failed": failed, "clusters": keys, "pieces": pieces}
    write_json(out / RECORD, record)
    return record


def piece_size(count: int, of_a_shard: float, batch: int, workers: int) -> int:
    """Samples of a piece: as a shard has where those are small, else whole batches, for as many pieces as tell the
    spread of their times."""
    batches = round(count / max(PIECES, 3 * workers) / batch)
    return max(1, math.ceil(min(of_a_shard, max(1, batches) * batch)))


@dataclass(frozen=True)
class Verdicts:
    """What became of one picture of the sample."""

    cluster: str
    """The shard that it was drawn from."""
    failed: bool
    kept: dict[str, int]
    """Texts by source."""
    texts: dict[str, int]


def verdicts(out: StoragePath, record: dict[str, Any]) -> Iterator[Verdicts]:
    """What became of every picture that was drawn, those that could not be read included."""
    for url, _ in record["failed"]:
        yield Verdicts(url, True, {}, {})
    for name in record["pieces"]:
        table = pq.read_table(
            table_source(out / "clean/dataset" / f"{name}.parquet"), columns=["key", "source", "verdict", "why"]
        )
        pictures: dict[str, Verdicts] = {}
        for key, source, verdict, why in zip(*table.to_pydict().values(), strict=True):
            cluster = record["clusters"].get(tar_key(key), "")
            row = pictures.setdefault(key, Verdicts(cluster, verdict == "failed", {}, {}))
            if not row.failed and why != NO_TEXT:  # a picture that came without a text
                row.texts[source] = row.texts.get(source, 0) + 1
                row.kept[source] = row.kept.get(source, 0) + (verdict == "kept")
        yield from pictures.values()


def written(out: StoragePath, pieces: dict[str, int]) -> list[tuple[float, float]]:
    """Of each piece the bytes that annotate and select wrote, and its samples."""
    places = ("annotated/annotations/{}.parquet", "clean/dataset/{}.parquet", "clean/dataset/{}.tar")
    files = {name: [out / place.format(name) for place in places] for name in pieces}
    sizes = {name: sum(file.stat().st_size for file in each if file.is_file()) for name, each in files.items()}
    return [(float(sizes[name]), float(count)) for name, count in pieces.items()]
