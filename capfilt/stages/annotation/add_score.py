"""add-score: further scores for annotations that are there, each in a table of its own beside them.

A score is a stage with a ledger, `score-NAME`. Those that read pictures share one pass over a shard: the stage of the
first one does the others' work on it too, whose stages then find it done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from capfilt.cluster.session import Session
from capfilt.cluster.worker_pool import Resources
from capfilt.data import shards
from capfilt.errors import DataError
from capfilt.inference.device import Compute, autocast
from capfilt.inference.scores.spec import ScoreSpec
from capfilt.runs import stage_status
from capfilt.runs.ledger import Ledger, fingerprint
from capfilt.runs.progress import Progress
from capfilt.runs.tally import Tally
from capfilt.stages.inputs import ShardsJob, annotated_urls_by_name, changed_shards
from capfilt.stages.runner import identities, run_stage
from capfilt.stages.select import annotations_sha256
from capfilt.storage.paths import StoragePath


class AddScoreJob(ShardsJob):
    """What a worker needs to know to give annotations a score."""

    unit: ClassVar[str] = "shards"

    spec: ScoreSpec
    fingerprint: str
    compute: Compute
    batch_size: int
    beside: tuple[AddScoreJob, ...] = ()
    """Other scores that read the same pictures, to be computed in the same pass where they are missing."""

    @property
    def name(self) -> str:
        return f"score-{self.spec.name}"

    @property
    def loads(self) -> str:
        """What the progress line waits for."""
        return f"{self.spec.name} to load"

    @property
    def by_content(self) -> bool:
        """Whether it reads shards, and not their annotations alone."""
        return self.spec.reads_pictures

    def identity(self, item: str) -> str:
        """The score by its weights and number format, and the sha256 of the shard's annotations."""
        precision = self.compute.precision if self.spec.computes else ""
        scored = annotations_sha256(self.out / "annotations", self.shard_name(item))
        return fingerprint(self.spec.name, self.fingerprint, precision, shards.name(item), scored)

    def open(self) -> Callable[[str], None]:
        """Load what this score and those beside it are computed with."""
        from capfilt.stages.annotation.shard_scorer import ShardScorer

        device, dtype = self.compute.open(), self.compute.dtype
        scorer = ShardScorer(self, device)

        def shard(url: str) -> None:
            with autocast(device, dtype):
                scorer.shard(url)

        return shard


def check_annotated(out: StoragePath, urls: Sequence[str], show: Progress) -> dict[str, str]:
    """The URL of each shard by the name of its annotations in `out`.

    Raises:
        DataError: a shard was not annotated there, or has changed since.
    """
    named, ledger = annotated_urls_by_name(out, urls), Ledger(out, "annotate")
    done = {one.shard: one for one in ledger.readable_completions() if one.shard in named}
    if missing := [name for name in named if name not in done]:
        raise DataError(
            f"{len(missing)} of {len(named)} shards are not annotated in {out}, first {missing[0]}: annotate them"
            " there first, or give the shards that are."
        )
    if changed := sorted(changed_shards(ledger, done, named, show, "scores")):
        raise DataError(
            f"shard {changed[0]} has changed since it was annotated in {out}: run the `capfilt annotate` of that run"
            " again, then add the scores."
        )
    return named


def add_scores(
    session: Session,
    named: dict[str, str],
    jobs: Sequence[AddScoreJob],
    resources: Resources,
    show: Progress,
) -> dict[str, Tally]:
    """Give annotated shards these scores; returns, by score, what became of their samples and texts."""
    names = shards.renamed(named)
    jobs = [job.model_copy(update={"names": names}) for job in jobs]
    jobs.sort(key=lambda job: not job.by_content)
    sharing = [job for job in jobs if job.by_content]
    tallies = {}
    for number, job in enumerate(jobs):
        if job.by_content:
            job = job.model_copy(update={"beside": tuple(sharing[number + 1 :])})
            for other in job.beside if number == 0 else ():
                _plan(other, named)
        tallies[job.spec.name] = run_stage(session, job, named, resources, show, f"score {job.spec.name}")
    return tallies


def _plan(job: AddScoreJob, named: dict[str, str]) -> None:
    """Record what a stage is to do whose work another one begins, so that `status` knows of it."""
    ledger, wanted = Ledger(job.out, job.name), identities(job, named)
    if stage_status.read_plan(ledger)[1] != wanted:
        stage_status.write_plan(ledger, stage_status.StagePlan(f"score {job.spec.name}", len(named)), wanted)
