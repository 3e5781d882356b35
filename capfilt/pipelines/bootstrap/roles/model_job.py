"""Steps that train one model on the texts of shards by code of their own, beside the training loop; no verbs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from capfilt.cluster.session import Session
from capfilt.cluster.worker_pool import Resources
from capfilt.config import Config
from capfilt.runs.ledger import Ledger
from capfilt.runs.progress import Progress
from capfilt.runs.tally import Tally
from capfilt.stages.runner import run_stage
from capfilt.storage.atomic import staging_folder
from capfilt.storage.paths import StoragePath, listing


class ModelJob(Config):
    """Trains one model; its folder is `out/NAME`, and its one item is called so too."""

    name: ClassVar[str]

    out: StoragePath
    shards: tuple[str, ...]
    contents: dict[str, str]
    """The sha256 of each shard, by its URL."""
    seed: int = 0

    @property
    def model_folder(self) -> StoragePath:
        """The folder of the model and what belongs to it."""
        return self.out / self.name

    @abstractmethod
    def identity(self, item: str) -> str:
        """As `StageJob.identity`."""

    @abstractmethod
    def teach(self, folder: Path) -> float:
        """Write the trained model; returns its loss in nats a token."""

    def open(self) -> Callable[[str], str]:
        def work(item: str) -> str:
            with staging_folder(self.model_folder) as folder:
                loss = self.teach(folder)
            files = [self.model_folder / name for name in sorted(listing(self.model_folder))]
            Ledger(self.out, self.name).commit(item, self.identity(item), files, Tally.zero())
            return f"{loss:.3f} nats a token"

        return work


def train_model(session: Session, job: ModelJob, resources: Resources, progress: Progress, label: str) -> StoragePath:
    """Train it, unless the ledger has this very training; returns its folder."""
    run_stage(session, job, {job.name: job.name}, resources, progress, label)
    return job.model_folder
