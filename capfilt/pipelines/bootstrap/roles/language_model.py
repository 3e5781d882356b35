"""language: a small language model for BLIP-2's second stage, trained on the texts of shards (a step, not a verb)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

from capfilt.cluster.session import Session
from capfilt.cluster.worker_pool import Resources
from capfilt.config import Config
from capfilt.data import shards
from capfilt.data.sample import Sample
from capfilt.data.text.tokenizer import clean_caption
from capfilt.models.blip2.config import LanguageConfig
from capfilt.runs.ledger import Ledger, fingerprint
from capfilt.runs.progress import Progress
from capfilt.runs.tally import Tally
from capfilt.stages.runner import run_stage
from capfilt.storage.atomic import staging_folder
from capfilt.storage.paths import StoragePath, listing
from capfilt.training.config import TeachConfig


class LanguageJob(Config):
    """Trains one language model; its folder is `out/language`."""

    name: ClassVar[str] = "language"

    out: StoragePath
    language: LanguageConfig
    config: TeachConfig
    shards: tuple[str, ...]
    contents: dict[str, str]
    """The sha256 of each shard, by its URL."""
    seed: int = 0

    @property
    def model_folder(self) -> StoragePath:
        """The folder of the model and its tokenizer."""
        return self.out / "language"

    def identity(self, item: str) -> str:
        """The architecture, the settings of the training and the contents of the shards."""
        settings = self.model_dump(mode="json", exclude={"out", "shards", "contents"})
        return fingerprint(item, settings, [self.contents[url] for url in self.shards])

    def open(self) -> Callable[[str], str]:
        from capfilt.training.language_model import teach

        def work(item: str) -> str:
            with staging_folder(self.model_folder) as folder:
                loss = teach(folder, self.language, [*documents(self.shards)], self.config, self.seed)
            files = [self.model_folder / name for name in sorted(listing(self.model_folder))]
            Ledger(self.out, self.name).commit(item, self.identity(item), files, Tally.zero())
            return f"{loss:.3f} nats a token"

        return work


def documents(urls: Sequence[str]) -> Iterator[list[str]]:
    """Yield the texts of every image of the shards, cleaned as for a training."""
    for url in urls:
        for item in shards.read(url):
            if isinstance(item, Sample):
                yield [text for caption in item.captions if (text := clean_caption(str(caption["text"])))]


def train_language_model(
    session: Session, job: LanguageJob, resources: Resources, progress: Progress, label: str
) -> StoragePath:
    """Train it, unless the ledger has this very training; returns its folder."""
    run_stage(session, job, {"language": "language"}, resources, progress, label)
    return job.model_folder
