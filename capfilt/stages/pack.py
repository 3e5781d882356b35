"""pack: data of any source as tars in img2dataset's layout, written once: the bytes of the pictures as they came.

One shard in, one tar and one Parquet of all its rows out. Shards are called 00000, 00001, ... in the order given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from capfilt.cluster.session import Session
from capfilt.cluster.worker_pool import Resources
from capfilt.config import Config
from capfilt.data import shards
from capfilt.data.policy import failure_class
from capfilt.data.sample import Sample
from capfilt.data.shards.members import MemberCounts
from capfilt.runs.ledger import Ledger, fingerprint
from capfilt.runs.progress import Progress
from capfilt.runs.tally import Tally
from capfilt.stages.runner import run_stage
from capfilt.stages.select import write_sizes
from capfilt.storage import write_guard
from capfilt.storage.atomic import atomic
from capfilt.storage.paths import StoragePath, remove_file

STAGE = "pack"
_COLUMNS = ("key", "caption", "url", "uid", "sha256", "status", "error_message")
"""img2dataset's names, and a uid."""


class PackJob(Config):
    """The job that writes tars."""

    by_content: ClassVar[bool] = True

    out: StoragePath
    """The folder of the tars."""
    names: dict[str, str]
    """By URL, the number of each shard."""

    @property
    def name(self) -> str:
        """The stage."""
        return STAGE

    def identity(self, item: str) -> str:
        """What is written depends on what is read alone."""
        return fingerprint(STAGE, self.names[item])

    def open(self) -> Callable[[str], None]:
        """Nothing to load."""
        return self._shard

    def _shard(self, url: str) -> None:
        name, tally, members = self.names[url], Tally.zero(), MemberCounts()
        digest = shards.Digest(shards.stat(url)["version"])
        rows: list[dict[str, str]] = []
        tar, table = self.out / f"{name}.tar", self.out / f"{name}.parquet"
        if not shards.write(tar, _kept(url, digest, members, tally, rows)):  # other loaders fail on an empty tar
            write_guard.check_lock(tar)
            remove_file(tar)
        with atomic(table) as file:
            schema = pa.schema([(column, pa.string()) for column in _COLUMNS])
            pq.write_table(pa.Table.from_pylist(rows, schema), file, compression="zstd")
        tally.members.update(members)
        outputs = [tar, table] if tally.samples["kept"] else [table]
        Ledger(self.out, STAGE).commit(name, self.identity(url), outputs, tally, digest.result())


def _kept(
    url: str, digest: shards.Digest, members: MemberCounts, tally: Tally, rows: list[dict[str, str]]
) -> Iterator[Sample]:
    """The samples of a shard, with uid and sha256 in their json; every key is counted, and a row of the table."""
    for item in shards.read(url, digest, members, extras=True):
        if not isinstance(item, Sample):
            tally.samples.update(["in", "failed"])
            tally.failed[failure_class(item.reason)] += 1
            rows.append({"key": item.key, "status": "failed", "error_message": item.reason})
            continue
        tally.samples.update(["in", "kept"])
        for caption in item.captions:
            tally.texts["in"][caption["source"]] += 1
            tally.texts["kept"][caption["source"]] += 1
        known = {"uid": item.uid, "sha256": item.sha256}
        url_of_it = {"url": item.meta["url"]} if isinstance(item.meta.get("url"), str) else {}
        rows.append({"key": item.key, "caption": item.text, "status": "success", **known, **url_of_it})
        yield replace(item, meta={**item.meta, **known})


def pack(session: Session, named: Mapping[str, str], out: StoragePath, resources: Resources, show: Progress) -> Tally:
    """Write every shard, given as name -> URL, that is not committed yet, and sizes.json; returns the counts."""
    job = PackJob(out=out.absolute(), names={url: name for name, url in named.items()})
    total = run_stage(session, job, named, resources, show, STAGE)
    kept = {f"{done.shard}.tar": done.tally.samples["kept"] for done in Ledger(out, STAGE).completions()}
    write_sizes(out, {tar: count for tar, count in kept.items() if count})
    return total
