"""leave-out: shards without the samples that a deduplication or a decontamination drops, written once for all rounds.

One shard in, one tar and one table of what was left out; a shard that keeps all of its samples is not written again and
is used where it lies. What stands for copies has their texts too, where these were merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import ClassVar

from capfilt.cluster.session import Session
from capfilt.cluster.worker_pool import Resources
from capfilt.data import duplicates, shards
from capfilt.data.duplicates import Copies
from capfilt.data.policy import failure_class
from capfilt.data.sample import FailedSample, Sample
from capfilt.data.shards.members import MemberCounts
from capfilt.errors import DataError
from capfilt.runs.ledger import Ledger, fingerprint
from capfilt.runs.progress import Progress
from capfilt.runs.tally import Tally
from capfilt.stages.inputs import ShardsJob
from capfilt.stages.outputs import write_shard
from capfilt.stages.runner import run_stage
from capfilt.storage.paths import StoragePath, make_folder

STAGE = "leave-out"
FOLDER = "left-out"
"""Of the run folder, beside the tars: the tables of what was left out."""
_COLUMNS = ("key", "uid", "sha256", "status", "reason")


class LeaveOutJob(ShardsJob):
    """The job that writes shards without some of their samples."""

    name: ClassVar[str] = STAGE
    by_content: ClassVar[bool] = True

    without: tuple[StoragePath, ...]
    """Run folders of deduplications and decontaminations."""

    def identity(self, item: str) -> str:
        """What each run says of the shard."""
        name = self.shard_name(item)
        return fingerprint([duplicates.content(folder, name) for folder in self.without], name)

    def open(self) -> Callable[[str], None]:
        return self._shard

    def _shard(self, url: str) -> None:
        name, tally, members = self.shard_name(url), Tally.zero(), MemberCounts()
        digest = shards.Digest(shards.stat(url)["version"])
        gone: list[dict[str, str]] = []
        make_folder(self.out / FOLDER)
        tar, table = self.out / f"{name}.tar", self.out / FOLDER / f"{name}.parquet"
        outputs = write_shard(tar, table, self._kept(url, digest, members, tally, gone), gone, _COLUMNS)
        tally.members.update(members)
        Ledger(self.out, STAGE).commit(name, self.identity(url), outputs, tally, digest.result())

    def _kept(
        self, url: str, digest: shards.Digest, members: MemberCounts, tally: Tally, gone: list[dict[str, str]]
    ) -> Iterator[Sample]:
        """The samples that stay; all others are counted, and their rows added to `gone`."""

        def skip(sample: Sample, reason: str) -> None:
            tally.samples.update(["in", "dropped"])
            for caption in sample.captions:
                tally.add_text(caption["source"], duplicates.reason_class(reason))
            names = {"key": sample.key, "uid": sample.uid, "sha256": sample.sha256}
            gone.append({**names, "status": "dropped", "reason": reason})

        read: Iterable[Sample | FailedSample] = shards.read(url, digest, members, extras=True)
        for folder in self.without:
            read = Copies.load(folder, self.shard_name(url)).apply(read, skip)
        for item in read:
            if isinstance(item, Sample):
                tally.samples.update(["in", "kept"])
                for caption in item.captions:
                    tally.add_text(caption["source"])
                yield item
            else:
                tally.add_failed(failure_class(item.reason))
                gone.append({"key": item.key, "uid": "", "sha256": "", "status": "failed", "reason": item.reason})


def leave_out(
    session: Session,
    named: Mapping[str, str],
    job: LeaveOutJob,
    resources: Resources,
    show: Progress,
) -> dict[str, str]:
    """Write the shards, given as name -> URL, of which something goes or is added; returns where each lies now.

    A shard of which nothing is left is in it no more. DataError where that is so of all.
    """
    renamed = shards.renamed(named)
    # Of shards that share a file's name all are written, so that the new ones are told apart by the same names.
    touched = {
        name: url
        for name, url in named.items()
        if renamed or any(duplicates.says(folder, name) for folder in job.without)
    }
    job = job.model_copy(update={"names": renamed})
    run_stage(session, job, touched, resources, show, "leave out")
    kept = {done.shard: done.tally.samples["kept"] for done in Ledger(job.out, STAGE).completions()}
    left = {
        name: str(job.out / f"{name}.tar") if name in touched else url
        for name, url in named.items()
        if name not in touched or kept[name]
    }
    if not left:
        raise DataError(
            f"nothing is left of {len(named)} shards: all of their samples are copies or held-out pictures."
        )
    return left
