"""annotate: a captioner writes texts for every image of the shards, a filter scores them and the web's; all is kept.

One shard in, one Parquet out (design 4.2): a row for every text, and one for every key that could not be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from capfilt.cluster.session import Session
from capfilt.cluster.worker_pool import Resources
from capfilt.config import added
from capfilt.data import duplicates, shards
from capfilt.inference.captioners.spec import CaptionerSpec
from capfilt.inference.config import EXECUTION_FIELDS, AnnotateConfig
from capfilt.inference.device import Compute, autocast
from capfilt.runs.ledger import fingerprint
from capfilt.runs.metrics import ShardReport
from capfilt.runs.progress import Progress
from capfilt.runs.tally import Tally
from capfilt.stages.bisect import Splittable
from capfilt.stages.inputs import ShardsJob
from capfilt.stages.runner import run_stage
from capfilt.storage.paths import StoragePath


class AnnotateJob(ShardsJob):
    """What an annotating worker needs to know."""

    name: ClassVar[str] = "annotate"
    splittable: ClassVar[bool] = True
    by_content: ClassVar[bool] = True
    lists_images: ClassVar[bool] = True
    loads: ClassVar[str] = "the captioner and the filter to load"

    captioner: CaptionerSpec
    filter: StoragePath
    captioner_fingerprint: str
    filter_fingerprint: str
    config: AnnotateConfig
    compute: Compute
    seed: int
    round: int
    without: StoragePath | None = added(None)
    """The run folder of a deduplication: copies are neither captioned nor scored, and the pictures that stand for them
    have their texts too."""
    keep_vectors: bool = added(False)
    """Whether the hashes of the pictures and the filter's vectors of them are kept, in `embeddings/`."""

    def identity(self, item: str) -> str:
        """Models by their weights, not by where they lie: a run folder may be moved."""
        where = dict.fromkeys(("out", "captioner", "filter", "names", "without", "keep_vectors"), True)
        copies = [] if self.without is None else [duplicates.content(self.without, self.shard_name(item))]
        dump = self.model_dump(mode="json", exclude={**where, "config": EXECUTION_FIELDS})
        return fingerprint(dump, shards.name(item), *copies)

    def open(self) -> Splittable:
        from capfilt.inference.timer import StageTimer
        from capfilt.stages.annotation.shard_annotator import ShardAnnotator

        device, dtype = self.compute.open(), self.compute.dtype
        annotator = ShardAnnotator(self, device, StageTimer(device))

        def shard(url: str) -> ShardReport:
            with autocast(device, dtype):
                return annotator.shard(url)

        def part(url: str, start: int, stop: int) -> int:
            with autocast(device, dtype):
                return annotator.part(url, start, stop)

        return Splittable(shard, part, annotator.expect, annotator.reading.close)


def annotate(
    session: Session,
    urls: Sequence[str],
    job: AnnotateJob,
    resources: Resources,
    show: Progress,
    label: str = "annotate",
) -> Tally:
    """Annotate shards with models that fit their roles (`inference.roles`); returns what became of their samples and
    texts."""
    named = shards.by_name(urls)
    job = job.model_copy(update={"names": shards.renamed(named)})
    return run_stage(session, job, named, resources, show, label)
