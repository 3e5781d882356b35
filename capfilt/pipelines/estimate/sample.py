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
from capfilt.storage import documents
from capfilt.storage.atomic import write_json
from capfilt.storage.paths import StoragePath, make_folder, remove_folder, table_source

RECORD, SHARDS = "sample.json", "sample"
PIECES = 8
"""At least, where the sample has as many batches."""


@dataclass(frozen=True)
class Verdicts:
    """What became of one picture of the sample."""

    cluster: str
    """The shard that it was drawn from."""
    kept: dict[str, int]
    """Texts by source."""
    texts: dict[str, int]
    failed: bool = False


def open_sample(out: StoragePath, asked: dict[str, Any]) -> dict[str, Any] | None:
    """The record of the sample that lies in a folder; None for none. RunError for one that was drawn otherwise."""
    path = out / RECORD
    if not path.is_file():
        return None
    record = documents.read_object(path)
    if record.get("asked") != asked:
        before: Any = record.get("asked")
        changed = [key for key in asked if not isinstance(before, dict) or before.get(key) != asked[key]]
        raise RunError(
            f"{out} holds an estimate that was asked otherwise ({', '.join(changed)}); give another --out, or remove it."
        )
    return record


def write_sample(out: StoragePath, drawn: Draw, batch: int, workers: int, asked: dict[str, Any]) -> dict[str, Any]:
    """Write the readable samples as shards below `out`, and the record of the draw, as the last act.

    Raises:
        DataError: nothing that was drawn can be read.
    """
    readable = [(url, item) for url, item in drawn.items if isinstance(item, Sample)]
    failed = [(url, item.reason) for url, item in drawn.items if isinstance(item, FailedSample)]
    if not readable:
        first = f"; the first fault: {failed[0][1]}" if failed else ""
        raise DataError(f"nothing of {len(drawn.urls)} shards (first {drawn.urls[0]}) can be read{first}.")
    size = piece_size(len(readable), drawn.num_samples / len(drawn.urls), batch, workers)
    remove_folder(out / SHARDS)
    make_folder(out / SHARDS)
    keys: dict[str, str] = {}
    counts: dict[str, int] = {}
    for number in range(math.ceil(len(readable) / size)):
        piece = []
        for url, item in readable[number * size : (number + 1) * size]:
            key = item.key if tar_key(item.key) not in keys else f"{shards.name(url)}-{item.key}"
            keys[tar_key(key)] = url
            piece.append(replace(item, key=key))
        counts[f"{number:05d}"] = shards.write(out / SHARDS / f"{number:05d}.tar", piece)
    record = {
        "asked": asked,
        "shards": len(drawn.urls),
        "shards_read": len(drawn.counts),
        "samples": drawn.num_samples,
        "counts": drawn.counts,
        "bytes": drawn.num_bytes,
        "sizes": {url: drawn.sizes[url] for url in drawn.counts if url in drawn.sizes},
        "is_census": drawn.is_census,
        "drawn": len(drawn.items),
        "failed": failed,
        "clusters": keys,
        "pieces": counts,
    }
    write_json(out / RECORD, record)
    return record


def piece_size(count: int, of_a_shard: float, batch: int, workers: int) -> int:
    """Samples of a piece: as a shard has where those are small, else whole batches, for as many pieces as tell the
    spread of their times."""
    wanted = count / max(PIECES, 3 * workers)
    return max(1, math.ceil(min(of_a_shard, max(batch, batch * round(wanted / batch)))))


def verdicts(out: StoragePath, record: dict[str, Any]) -> Iterator[Verdicts]:
    """What became of every picture that was drawn, those that could not be read included."""
    for url, _ in record["failed"]:
        yield Verdicts(url, {}, {}, failed=True)
    for path in sorted((out / "clean" / "dataset").glob("*.parquet")):
        columns = pq.read_table(table_source(path), columns=["key", "source", "verdict"]).to_pydict()
        pictures: dict[str, Verdicts] = {}
        for key, source, verdict in zip(*columns.values(), strict=True):
            cluster = record["clusters"].get(tar_key(key), "")
            row = pictures.setdefault(key, Verdicts(cluster, {}, {}, failed=verdict == "failed"))
            if verdict != "failed":
                row.texts[source] = row.texts.get(source, 0) + 1
                row.kept[source] = row.kept.get(source, 0) + (verdict == "kept")
        yield from pictures.values()


def written(out: StoragePath, counts: dict[str, int]) -> list[tuple[float, float]]:
    """Of each piece the bytes that annotate and select wrote, and its samples (`counts` by the piece's name)."""
    rows = []
    for name, count in counts.items():
        files = [
            out / "annotated" / "annotations" / f"{name}.parquet",
            out / "clean" / "dataset" / f"{name}.parquet",
            out / "clean" / "dataset" / f"{name}.tar",
        ]
        rows.append((float(sum(file.stat().st_size for file in files if file.is_file())), float(count)))
    return rows
