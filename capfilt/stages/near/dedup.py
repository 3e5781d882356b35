"""dedup: of near pictures one is kept, and each of the others is written down with the kept one that stands for it.

What is near is found by `pairs`, spread over workers; who is kept is decided here, in the driver, in one go over
the pool. Some 90 bytes are held for each picture, and the keys of those that stand for others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow.compute as pc

import capfilt.data.annotations as tables
from capfilt.cluster.session import Session
from capfilt.cluster.worker_pool import Resources
from capfilt.data import duplicates, parquet, shards
from capfilt.data.duplicates import FOLDER, STAGE, TEXT_SCHEMA, TEXTS
from capfilt.data.sample import Sample
from capfilt.errors import DataError
from capfilt.index.leaders import Leaders
from capfilt.index.pool import Pool
from capfilt.runs.ledger import Ledger, fingerprint
from capfilt.runs.progress import Progress
from capfilt.runs.tally import Tally
from capfilt.stages.inputs import ShardsJob
from capfilt.stages.runner import run_stage
from capfilt.storage.paths import StoragePath, listing, remove_file

Keep = Literal["best", "largest", "first"]
"""Which of near pictures is kept: of the highest score, then of the most pixels; of the most pixels; the first of the
pool. Among equals it is the one with the smallest uid, then the first of the pool."""

LOST = "lost-texts"


class Pictures:
    """What decides about the pictures of a pool, as arrays by row."""

    def __init__(self, pool: Pool) -> None:
        count = pool.num_rows
        self.pool = pool
        self.pixels = np.zeros(count, np.int64)
        self.uids = np.zeros((count, 2), ">u8")
        self.content = np.zeros(count, ">u8")
        """The beginning of each sha256."""
        self.scores = np.full(count, -np.inf, np.float32)

    @classmethod
    def read(cls, pool: Pool, scores: StoragePath | None, show: Progress) -> Pictures:
        """Read the tables of a pool; `scores` is a run folder with annotations: each picture's best score counts."""
        pictures, scored = cls(pool), 0
        with show.stage("pictures", len(pool.shards)) as line:
            for number, (start, table) in enumerate(pool.read(pool.shards, False), 1):
                rows = slice(start, start + table.num_rows)
                pictures.pixels[rows] = table["width"].to_numpy().astype(np.int64) * table["height"].to_numpy()
                pictures.uids[rows] = _words(table["uid"].to_pylist(), 2)
                pictures.content[rows] = _words([text[:16] for text in table["sha256"].to_pylist()], 1)[:, 0]
                if scores is not None:
                    best = best_scores(scores, pool.shards[number - 1].name)
                    places = zip(table["key"].to_pylist(), table["uid"].to_pylist(), strict=True)
                    pictures.scores[rows] = [best.get(place, -np.inf) for place in places]
                    scored += int(np.isfinite(pictures.scores[rows]).sum())
                line.update(number)
        if scores is not None and scored < pool.num_rows:
            show.say(f"{pool.num_rows - scored:,} of {pool.num_rows:,} pictures have no score in {scores}; others win")
        return pictures

    def order(self, keep: Keep) -> np.ndarray:
        """The rows, those to be kept first, int64 [N]."""
        if keep == "first":
            return np.arange(len(self.pixels))
        columns = [self.uids[:, 1], self.uids[:, 0], -self.pixels]  # the last one decides first
        return np.lexsort([*columns, -self.scores] if keep == "best" else columns)

    def reused_uids(self) -> int:
        """How many uids stand for pictures of different bytes."""
        order = np.lexsort((self.content, self.uids[:, 1], self.uids[:, 0]))
        uids, content = self.uids[order], self.content[order]
        same = (uids[1:] == uids[:-1]).all(axis=1)
        return len(np.unique(uids[1:][same & (content[1:] != content[:-1])], axis=0))

    def uid(self, row: int) -> str:
        """32 hex digits."""
        digits: str = self.uids[row].tobytes().hex()
        return digits


def _words(texts: list[str], width: int) -> np.ndarray:
    """Hex digits as big-endian numbers, uint64 [N, width]."""
    try:
        return np.frombuffer(bytes.fromhex("".join(texts)), ">u8").reshape(len(texts), width)
    except ValueError:
        raise DataError("a uid or sha256 of a table is not of hex digits: embed its shard again.") from None


def check_scored(run: StoragePath, names: Iterable[str]) -> None:
    """Raise DataError for a shard of which a run has no annotations."""
    there = listing(run / "annotations") if (run / "annotations").is_dir() else ()
    if missing := [name for name in names if f"{name}.parquet" not in there]:
        raise DataError(
            f"--scores {run} has no annotations of the shard {missing[0]}; give a run that annotated the pool."
        )


def best_scores(run: StoragePath, shard: str) -> dict[tuple[str, str], float]:
    """The best score of each picture of a shard by (key, uid): itm where the filter gave it, else itc."""
    table = tables.read(run / "annotations" / f"{shard}.parquet")
    score = "itm" if table["itm"].null_count < table.num_rows else "itc"
    best = table.filter(pc.is_valid(table[score])).group_by(["key", "uid"]).aggregate([(score, "max")])
    places = zip(best["key"].to_pylist(), best["uid"].to_pylist(), strict=True)
    return dict(zip(places, best[f"{score}_max"].to_pylist(), strict=True))


class Deduplication:
    """Who goes, and for whom; written down shard by shard."""

    def __init__(self, pictures: Pictures, leaders: Leaders, kinds: Sequence[str]) -> None:
        self.pictures, self.leaders, self.kinds = pictures, leaders, kinds
        self.pool = pictures.pool
        self.leader = np.where(leaders.kept, np.arange(len(leaders.leader)), leaders.leader)
        self.starts = np.array(list(self.pool.starts.values()), np.int64)

    @cached_property
    def keys(self) -> dict[int, str]:
        """The keys of those that stand for others, by row."""
        wanted, keys = np.unique(self.leader[~self.leaders.kept]), dict[int, str]()
        for start, table in self.pool.read(self.pool.shards, False):
            low, high = np.searchsorted(wanted, [start, start + table.num_rows])
            rows = wanted[low:high]
            keys |= dict(zip(rows.tolist(), table["key"].take(rows - start).to_pylist(), strict=True))
        return keys

    def write(self, out: StoragePath, show: Progress) -> None:
        with show.stage("write", len(self.pool.shards)) as line:
            for number, (start, table) in enumerate(self.pool.read(self.pool.shards, False), 1):
                name = self.pool.shards[number - 1].name
                gone = np.flatnonzero(~self.leaders.kept[start : start + table.num_rows])
                rows, stands = gone + start, self.leader[gone + start]
                owners = np.searchsorted(self.starts, stands, "right") - 1
                columns = {
                    "shard": [name] * len(rows),
                    "key": table["key"].take(gone).to_pylist(),
                    "uid": table["uid"].take(gone).to_pylist(),
                    "group": stands,
                    "representative": [self.pictures.uid(row) for row in stands],
                    "representative_shard": [self.pool.shards[owner].name for owner in owners],
                    "representative_key": [self.keys[row] for row in stands.tolist()],
                    "kind": [self.kinds[kind] for kind in self.leaders.kind[rows]],
                    "distance": self.leaders.distance[rows],
                }
                duplicates.write(out / FOLDER / f"{name}.parquet", columns)
                line.update(number)

    def summary(self) -> dict[str, Any]:
        """Counts by kind, and groups by their size."""
        kept, count = self.leaders.kept, len(self.leader)
        by_kind = Counter(self.leaders.kind[~kept].tolist())
        sizes = np.unique(self.leader[~kept], return_counts=True)[1] + 1
        return {
            "pictures": count,
            "kept": int(kept.sum()),
            "dropped": int((~kept).sum()),
            "share": float((~kept).mean()),
            "by": {kind: by_kind[number] for number, kind in enumerate(self.kinds)},
            "groups": {"count": len(sizes), "largest": int(sizes.max(initial=0)), "sizes": size_counts(sizes)},
        }


def commit(pool: Pool, out: StoragePath, identities: dict[str, str]) -> None:
    """Record each shard as done, with how many of its pictures stay and go."""
    ledger = Ledger(out, STAGE)
    for shard in pool.shards:
        paths = [out / folder / f"{shard.name}.parquet" for folder in (FOLDER, TEXTS)]
        gone = parquet.num_rows(paths[0])
        tally = Tally(samples=Counter({"in": shard.rows, "kept": shard.rows - gone, "dropped": gone}))
        ledger.commit(shard.name, identities[shard.name], [path for path in paths if path.is_file()], tally)


def size_counts(sizes: np.ndarray) -> dict[str, int]:
    """How many groups have 2, 3 to 4, 5 to 8, ... pictures."""
    counts: dict[str, int] = {}
    low = 2
    while len(sizes) and low <= sizes.max():
        high = 2 if low == 2 else 2 * (low - 1)
        counts[f"{low}" if low == high else f"{low}-{high}"] = int(((sizes >= low) & (sizes <= high)).sum())
        low = high + 1
    return counts


def verdict_line(summary: dict[str, Any], by: str) -> str:
    """What a person should know of a result that is of little use; "" of any other."""
    if summary["kept"] == 1 and summary["pictures"] > 2:
        return f"{by}: one picture stands for all {summary['pictures']:,}: ask for nearer ones, in another --out"
    if not summary["dropped"]:
        return f"{by}: no two of {summary['pictures']:,} pictures are that near; all are kept"
    return ""


class LostTextsJob(ShardsJob):
    """Reads the texts of the pictures of a shard that go; an item is the URL of the shard."""

    name: ClassVar[str] = LOST
    by_content: ClassVar[bool] = True
    only_reads: ClassVar[bool] = True

    def identity(self, item: str) -> str:
        name = self.shard_name(item)
        return fingerprint(name, duplicates.read(self.out / FOLDER / f"{name}.parquet").to_pylist())

    def open(self) -> Callable[[str], None]:
        return self.shard

    def shard(self, url: str) -> None:
        """Write a row for every web and human text of a picture that goes: whom it is for, and where it is from."""
        name = self.shard_name(url)
        table = duplicates.read(self.out / FOLDER / f"{name}.parquet")
        gone = {(row["key"], row["uid"]): row for row in table.to_pylist()}
        digest = shards.Digest(shards.stat(url)["version"])
        rows: list[dict[str, str]] = []
        for item in shards.read(url, digest):
            row = gone.pop((item.key, item.uid), None) if isinstance(item, Sample) else None
            if row is not None and isinstance(item, Sample):
                told = [one for one in item.captions if one["source"] != "synthetic"]
                rows += [{**row, "text": _storable(one["text"]), "source": one["source"]} for one in told]
        if gone:
            raise DataError(f"{url} has no picture {next(iter(gone))[0]!r}: it is not the shard that was embedded.")
        path = self.out / LOST / f"{name}.parquet"
        duplicates.write(path, _columns(rows, LOST_SCHEMA.names), LOST_SCHEMA)
        Ledger(self.out, LOST).commit(name, self.identity(url), [path], Tally.zero(), digest.result())


LOST_SCHEMA = duplicates.SCHEMA.append(TEXT_SCHEMA.field("text")).append(TEXT_SCHEMA.field("source"))


def _storable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _columns(rows: list[dict[str, Any]], names: list[str]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in names}


def merge_texts(session: Session, out: StoragePath, urls: dict[str, str], resources: Resources, show: Progress) -> int:
    """Hand the texts of the pictures that go to those that stand for them: `out/texts/SHARD.parquet`; how many.

    A text that the picture has already from another copy is handed on once. All of them are in memory at the end, some
    300 bytes each.
    """
    job = LostTextsJob(out=out.absolute(), names={url: name for name, url in urls.items()})
    run_stage(session, job, urls, resources, show, "texts of copies")
    inherited: dict[str, dict[tuple[str, str, str], dict[str, str]]] = {}
    for name in sorted(urls):
        for row in duplicates.read(out / LOST / f"{name}.parquet", LOST_SCHEMA).to_pylist():
            place = row["representative_key"], row["representative"], row["text"].strip()
            handed = {"key": place[0], "uid": place[1], "text": row["text"], "source": row["source"]}
            texts = inherited.setdefault(row["representative_shard"], {})
            texts.setdefault(place, {**handed, "from_shard": row["shard"], "from_uid": row["uid"]})
    for name in urls:
        remove_file(out / TEXTS / f"{name}.parquet")  # of embeddings that have changed since
    for name, texts in inherited.items():
        columns = _columns(list(texts.values()), TEXT_SCHEMA.names)
        duplicates.write(out / TEXTS / f"{name}.parquet", columns, TEXT_SCHEMA)
    return sum(map(len, inherited.values()))
