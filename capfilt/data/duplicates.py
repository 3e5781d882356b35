"""Duplicates: for each shard a table of its pictures that go, each with the kept picture that stands for it.

Exact copies share their uid where it comes from their bytes, so a picture that goes is known by uid and key. With
`dedup --merge-texts` there is a second table, of the texts that pictures of the shard inherit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from capfilt.data import parquet
from capfilt.data.sample import FailedSample, Sample
from capfilt.errors import DataError, FolderError
from capfilt.runs.ledger import Ledger, Output
from capfilt.storage.atomic import sha256_file
from capfilt.storage.paths import StoragePath

STAGE = "dedup"
FOLDER, TEXTS = "duplicates", "texts"
"""Of a run folder: the tables of what goes, and of what is inherited."""

_PLACE = [("key", pa.string()), ("uid", pa.string())]
SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        *_PLACE,
        ("group", pa.int64()),
        ("representative", pa.string()),
        ("representative_shard", pa.string()),
        ("representative_key", pa.string()),
        ("kind", pa.string()),
        ("distance", pa.float32()),
    ]
)
"""A picture that goes; the number of its group; the uid, the shard and the key of the kept picture that stands for it;
in which way the two are near (sha256 | phash | vector), and how far from each other: bits, or 1 - cosine."""
TEXT_SCHEMA = pa.schema(
    [*_PLACE, ("text", pa.string()), ("source", pa.string()), ("from_shard", pa.string()), ("from_uid", pa.string())]
)
"""A picture that stays; a text of a copy of it that goes; where that came from."""

REASON = "duplicate of "
"""How the reason of a text begins that goes with its picture; the uid of the picture that stands for it follows."""
HELD_OUT = "held-out image "
"""The same of a picture that is a copy of a held-out one, or has its text."""

SUSPECTS = ("decontaminate", "decontaminate-exact")
"""The stages whose ledgers name the tables of a decontamination, which stand for `duplicates/` in its run folder."""


def is_copy(reason: str) -> bool:
    """Whether a text goes with its picture, which is a copy of another one."""
    return reason.startswith((REASON, HELD_OUT))


def reason_class(reason: str) -> str:
    """The class by which a reason is counted: without the uid of a duplicate or a held-out picture."""
    return ("held-out image" if reason.startswith(HELD_OUT) else "duplicate") if is_copy(reason) else reason


def write(path: StoragePath, columns: Mapping[str, Any], schema: pa.Schema = SCHEMA) -> None:
    """Write one shard's table, zstd, atomically. DataError for more than a reader takes."""
    parquet.write(path, pa.Table.from_pydict(dict(columns), schema=schema))


def read(path: StoragePath, schema: pa.Schema = SCHEMA) -> pa.Table:
    """Read one shard's table in bounded memory. DataError for anything but such a table."""
    if not parquet.schema(path).equals(schema):
        raise DataError(f"{path} holds other columns than `capfilt dedup` writes: run it again in another --out.")
    table = parquet.read(path)
    if any(column.null_count for column in table.columns):
        raise DataError(f"{path} has a row without a value: run `capfilt dedup` again in another --out.")
    return table


@dataclass(frozen=True)
class Copies:
    """What a deduplication says of one shard."""

    shard: str
    reasons: Mapping[tuple[str, str], str]
    """By key and uid of a picture that goes, the reason."""
    inherited: Mapping[tuple[str, str], list[dict[str, str]]]
    """By key and uid of a picture that stays, the texts of its copies, as `Sample.all_captions` has them."""

    @classmethod
    def load(cls, folder: StoragePath, shard: str) -> Copies:
        """Read what the run folder of a deduplication or a decontamination has about a shard. DataError where that is
        nothing."""
        reasons: dict[tuple[str, str], str] = {}
        inherited = dict[tuple[str, str], list[dict[str, str]]]()
        if _is_decontamination(folder):
            for output in _suspects(folder, shard):
                columns = parquet.read(folder / output.path, ["key", "uid", "reason"]).to_pylist()
                reasons |= {(row["key"], row["uid"]): row["reason"] for row in columns if row["reason"]}
            return cls(shard, reasons, inherited)
        for row in read(_table(folder, shard)).to_pylist():
            reasons[row["key"], row["uid"]] = f"{REASON}{row['representative']}"
        texts = folder / TEXTS / f"{shard}.parquet"
        for row in read(texts, TEXT_SCHEMA).to_pylist() if texts.is_file() else ():
            inherited.setdefault((row["key"], row["uid"]), []).append({"text": row["text"], "source": row["source"]})
        return cls(shard, reasons, inherited)

    def reason(self, key: str, uid: str) -> str:
        """Why a picture goes: "duplicate of UID"; "" for one that stays."""
        return self.reasons.get((key, uid), "")

    def apply(
        self, read: Iterable[Sample | FailedSample], skip: Callable[[Sample, str], None]
    ) -> Iterator[Sample | FailedSample]:
        """The samples of the shard, with the texts that they inherit; those that go are given to `skip` instead, each
        with its reason."""
        for item in read:
            if isinstance(item, FailedSample):
                yield item
            elif reason := self.reason(item.key, item.uid):
                skip(item, reason)
            else:
                known = {caption["text"].strip() for caption in item.all_captions}
                texts = [
                    one for one in self.inherited.get((item.key, item.uid), ()) if one["text"].strip() not in known
                ]
                yield replace(item, meta={**item.meta, "captions": [*item.all_captions, *texts]}) if texts else item

    def check(self, there: Iterable[tuple[str, str]]) -> None:
        """Raise DataError unless every picture that goes is among those (key, uid) of the shard."""
        if missing := next(iter(sorted(self.reasons.keys() - set(there))), None):
            raise DataError(
                f"the shard {self.shard} has no picture {missing[0]!r} with uid {missing[1]}: the duplicates were found"
                " in other shards; embed and dedup these, and give that run with --without."
            )


def content(folder: StoragePath, shard: str) -> str:
    """The sha256 of what a deduplication or a decontamination says of a shard, for the fingerprint of who reads it."""
    if _is_decontamination(folder):
        return "+".join(output.sha256 for output in _suspects(folder, shard))
    _table(folder, shard)
    done = Ledger(folder, STAGE).read(Ledger(folder, STAGE).path / f"{shard}.json")
    if done is not None and not Ledger(folder, STAGE).find_damage(done):
        return "+".join(output.sha256 for output in done.outputs)
    return sha256_file(_table(folder, shard))


def says(folder: StoragePath, shard: str) -> bool:
    """Whether anything of a shard goes, or has texts of what goes."""
    copies = Copies.load(folder, shard)
    return bool(copies.reasons or copies.inherited)


def check_shards(folder: StoragePath, names: Iterable[str]) -> None:
    """Refuse a folder that is no finished deduplication or decontamination of these shards.

    Raises:
        FolderError: it is none.
        DataError: it is one of other shards.
    """
    if _is_decontamination(folder):
        for name in names:
            _suspects(folder, name)
        return
    if not (folder / "summary.json").is_file() or not (folder / FOLDER).is_dir():
        what = "is not finished: run its command again" if (folder / FOLDER).is_dir() else f"holds no {FOLDER}/"
        raise FolderError(f"--without {folder} {what}; give the --out of `capfilt dedup` or `capfilt decontaminate`.")
    for name in names:
        _table(folder, name)


def _table(folder: StoragePath, shard: str) -> StoragePath:
    path = folder / FOLDER / f"{shard}.parquet"
    if not path.is_file():
        raise DataError(
            f"{folder} says nothing of the shard {shard}: the duplicates were found in other shards; embed and dedup"
            " these, and give that run with --without."
        )
    return path


def _is_decontamination(folder: StoragePath) -> bool:
    return (folder / "contaminated.parquet").is_file()


def _suspects(folder: StoragePath, shard: str) -> list[Output]:
    """The tables that a decontamination committed of a shard; it has none where nothing was found."""
    found: list[Output] = []
    compared, missing = False, list[str]()
    for ledger in (Ledger(folder, stage) for stage in SUSPECTS):
        done = ledger.read(ledger.path / f"{shard}.json")
        if done is not None and (damage := ledger.find_damage(done)):
            raise DataError(f"{damage}: run the command of {folder} again.")
        compared |= done is not None
        missing += [ledger.stage] if done is None and ledger.path.is_dir() else []
        found += [] if done is None else done.outputs
    if not compared:
        raise DataError(
            f"{folder} says nothing of the shard {shard}: other shards were compared with held-out ones; embed and"
            " decontaminate these, and give that run with --without."
        )
    if missing:
        raise DataError(
            f"{folder} is not finished: {missing[0]} has not seen the shard {shard}; run its command again."
        )
    return found
