"""human-pairs: measure how well a filter tells human validation pairs from shuffled ones, where nobody knows which web
texts are right.

A step of annotate and of bootstrap, not a verb. It decides nothing: the policy's threshold comes from elsewhere.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from capfilt.cluster.session import Session
from capfilt.cluster.worker_pool import Resources
from capfilt.config import Config
from capfilt.data import shards
from capfilt.inference.device import Compute, autocast
from capfilt.models.checkpoints import store
from capfilt.runs.ledger import Ledger, fingerprint
from capfilt.runs.progress import Progress
from capfilt.runs.round_figures import HUMAN_PAIRS
from capfilt.runs.tally import Tally
from capfilt.stages.runner import run_stage
from capfilt.storage import documents
from capfilt.storage.atomic import write_json
from capfilt.storage.paths import StoragePath


class PairsJob(Config):
    """A filter before human validation pairs; its outcome is `out/FILE`."""

    loads: ClassVar[str] = "the filter to load and to score the pairs"
    file: ClassVar[str]
    name: ClassVar[str]

    out: StoragePath
    model: StoragePath
    shards: tuple[str, ...]
    contents: dict[str, str]
    """The sha256 of each shard, by its url."""
    batch_size: int = 64
    max_length: int = 35
    """Tokens of a text; as when annotating, since what is measured holds for those scores."""
    compute: Compute

    def identity(self, item: str) -> str:
        """The filter's weights, the validation shards and the settings."""
        return fingerprint(
            item,
            store.fingerprint(self.model),
            [(shards.name(url), self.contents[url]) for url in self.shards],
            self.model_dump(mode="json", exclude={"out", "model", "shards", "contents", "batch_size"}),
        )

    @abstractmethod
    def measure(self, filter_: Any, pairs: Any) -> dict[str, Any]:
        """The figures of a filter on encoded pairs."""

    @abstractmethod
    def summary(self, figures: dict[str, Any]) -> str:
        """The figures in a few words."""

    def open(self) -> Callable[[str], str]:
        from capfilt.evaluation.eval_set import encode_pairs
        from capfilt.inference.filters import local_filter
        from capfilt.inference.local_model import LocalModel

        device, dtype = self.compute.open(), self.compute.dtype
        filter_ = local_filter(LocalModel.load(self.model, device, dtype), self.max_length)

        def work(item: str) -> str:
            with autocast(device, dtype):
                pairs = encode_pairs(filter_.local, self.shards, self.batch_size, device)
                figures = self.measure(filter_, pairs)
            path = self.out / self.file
            write_json(path, figures)
            Ledger(self.out, self.name).commit(item, self.identity(item), [path], Tally.zero())
            return self.summary(figures)

        return work


class HumanPairsJob(PairsJob):
    """How well a filter tells pairs from shuffled ones."""

    file = HUMAN_PAIRS
    name = "human-pairs"

    def measure(self, filter_: Any, pairs: Any) -> dict[str, Any]:
        from capfilt.evaluation import evaluate

        return evaluate.human_pairs(filter_, pairs, self.batch_size)

    def summary(self, figures: dict[str, Any]) -> str:
        return ", ".join(f"AUC of {score} {area:.3f}" for score, area in figures["auc"].items())


def measure_human_pairs(
    session: Session, job: HumanPairsJob, resources: Resources, show: Progress, label: str = "human pairs"
) -> dict[str, Any]:
    """The figures of a filter on human pairs against shuffled ones (`evaluation.evaluate.human_pairs`)."""
    run_stage(session, job, {"human-pairs": "human-pairs"}, resources, show, label)
    return documents.read_object(job.out / HUMAN_PAIRS)
