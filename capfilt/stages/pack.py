"""pack: data of any source as tars in img2dataset's layout, written once: the bytes of the pictures as they came.

One shard in, one tar and one Parquet of all its rows out. Shards are called 00000, 00001, ... in the order given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import ClassVar

from capfilt.cluster.session import Session
from capfilt.cluster.worker_pool import Resources
from capfilt.data import shards
from capfilt.data.policy import failure_class
from capfilt.data.sample import Sample
from capfilt.data.shards.members import MemberCounts
from capfilt.runs.ledger import Ledger, fingerprint
from capfilt.runs.progress import Progress
from capfilt.runs.tally import Tally
from capfilt.stages.inputs import ShardsJob
from capfilt.stages.outputs import sizes_of, write_shard, write_sizes
from capfilt.stages.runner import run_stage
from capfilt.storage.paths import StoragePath

STAGE = "pack"
_COLUMNS = ("key", "caption", "url", "uid", "sha256", "status", "error_message")
"""img2dataset's names, and a uid."""


class PackJob(ShardsJob):
    """The job that writes tars, each named with a number."""

    name: ClassVar[str] = STAGE
    by_content: ClassVar[bool] = True

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
        outputs = write_shard(tar, table, _kept(url, digest, members, tally, rows), rows, _COLUMNS)
        tally.members.update(members)
        Ledger(self.out, STAGE).commit(name, self.identity(url), outputs, tally, digest.result())


def _kept(
    url: str, digest: shards.Digest, members: MemberCounts, tally: Tally, rows: list[dict[str, str]]
) -> Iterator[Sample]:
    """The samples of a shard, with uid and sha256 in their json; every key is counted, and a row of the table."""
    for item in shards.read(url, digest, members, extras=True):
        if not isinstance(item, Sample):
            tally.add_failed(failure_class(item.reason))
            rows.append({"key": item.key, "status": "failed", "error_message": item.reason})
            continue
        tally.samples.update(["in", "kept"])
        for caption in item.captions:
            tally.add_text(caption["source"])
        known = {"uid": item.uid, "sha256": item.sha256}
        url_of_it = {"url": item.meta["url"]} if isinstance(item.meta.get("url"), str) else {}
        rows.append({"key": item.key, "caption": item.text, "status": "success", **known, **url_of_it})
        yield replace(item, meta={**item.meta, **known})


def pack(session: Session, named: Mapping[str, str], out: StoragePath, resources: Resources, show: Progress) -> Tally:
    """Write every shard, given as name -> URL, that is not committed yet, and sizes.json; returns the counts."""
    job = PackJob(out=out.absolute(), names={url: name for name, url in named.items()})
    total = run_stage(session, job, named, resources, show, STAGE)
    write_sizes(out, sizes_of(Ledger(out, STAGE)))
    return total
