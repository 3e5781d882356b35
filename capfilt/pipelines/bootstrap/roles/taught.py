"""Models that are trained on the texts of shards by code of their own, beside the training loop (steps, not verbs).

They are small, or trained once for a run: BLIP-2's language model, and a vision-language model that captions.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from capfilt.cluster.session import Session
from capfilt.cluster.worker_pool import Resources
from capfilt.config import Config
from capfilt.data import shards
from capfilt.data.sample import Sample
from capfilt.data.text.tokenizer import clean_caption
from capfilt.inference.device import Compute
from capfilt.models.blip2.config import LanguageConfig
from capfilt.runs.ledger import Ledger, fingerprint
from capfilt.runs.progress import Progress
from capfilt.runs.tally import Tally
from capfilt.stages.runner import run_stage
from capfilt.storage.atomic import staging_folder
from capfilt.storage.local_copies import local_copy
from capfilt.storage.paths import StoragePath, listing
from capfilt.training.config import TeachCaptionerConfig, TeachConfig


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


class LanguageJob(ModelJob):
    """Trains one language model."""

    name: ClassVar[str] = "language"

    language: LanguageConfig
    config: TeachConfig

    def identity(self, item: str) -> str:
        """The architecture, the settings of the training and the contents of the shards."""
        settings = self.model_dump(mode="json", exclude={"out", "shards", "contents"})
        return fingerprint(item, settings, [self.contents[url] for url in self.shards])

    def teach(self, folder: Path) -> float:
        from capfilt.training.language_model import teach

        return teach(folder, self.language, [*documents(self.shards)], self.config, self.seed)


def documents(urls: Sequence[str]) -> Iterator[list[str]]:
    """Yield the texts of every image of the shards, cleaned as for a training."""
    for url in urls:
        for item in shards.read(url):
            if isinstance(item, Sample):
                yield [text for caption in item.captions if (text := clean_caption(str(caption["text"])))]


class TeachJob(ModelJob):
    """Fine-tunes one vision-language model."""

    name: ClassVar[str] = "captioner"

    config: TeachCaptionerConfig
    start: StoragePath | None = None
    """The folder of the model that it begins with."""
    start_fingerprint: str | None = None
    prompt: str
    """What it learns to answer."""
    compute: Compute

    def identity(self, item: str) -> str:
        """The settings, what it begins with by its weights, and the contents of the shards."""
        settings = self.model_dump(mode="json", exclude={"out", "start", "shards", "contents", "compute"})
        settings["config"] |= {"start": None, "precision": self.compute.precision}
        return fingerprint(item, settings, [self.contents[url] for url in self.shards])

    def teach(self, folder: Path) -> float:
        from capfilt.training.vision_language import teach

        start, device = None if self.start is None else local_copy(self.start), self.compute.open()
        return teach(folder, start, self.shards, self.prompt, self.config, self.seed, device, self.compute.dtype)
