"""captioner: a vision-language model that is fine-tuned on the human pairs, once for a run (a step, not a verb)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from capfilt.cluster.session import Session
from capfilt.cluster.worker_pool import Resources
from capfilt.config import Config
from capfilt.inference.device import Compute
from capfilt.runs.ledger import Ledger, fingerprint
from capfilt.runs.progress import Progress
from capfilt.runs.tally import Tally
from capfilt.stages.runner import run_stage
from capfilt.storage.atomic import staging_folder
from capfilt.storage.local_copies import local_copy
from capfilt.storage.paths import StoragePath, listing
from capfilt.training.config import TeachCaptionerConfig

STAGE = "captioner"


class TeachJob(Config):
    """Fine-tunes one vision-language model; its folder is `out/captioner`."""

    name: ClassVar[str] = STAGE

    out: StoragePath
    config: TeachCaptionerConfig
    start: StoragePath | None = None
    """The folder of the model that it begins with."""
    start_fingerprint: str | None = None
    prompt: str
    """What it learns to answer."""
    shards: tuple[str, ...]
    contents: dict[str, str]
    """The sha256 of each shard, by its URL."""
    compute: Compute
    seed: int

    @property
    def model_folder(self) -> StoragePath:
        """The folder of the model and its processor."""
        return self.out / STAGE

    def identity(self, item: str) -> str:
        """The settings, what it begins with by its weights, and the contents of the shards."""
        settings = self.model_dump(mode="json", exclude={"out", "start", "shards", "contents", "compute"})
        settings["config"] |= {"start": None, "precision": self.compute.precision}
        return fingerprint(item, settings, [self.contents[url] for url in self.shards])

    def open(self) -> Callable[[str], str]:
        from capfilt.training.vision_language import teach

        device, dtype = self.compute.open(), self.compute.dtype

        def work(item: str) -> str:
            with staging_folder(self.model_folder) as folder:
                start = None if self.start is None else local_copy(self.start)
                loss = teach(folder, start, self.shards, self.prompt, self.config, self.seed, device, dtype)
            files = [self.model_folder / name for name in sorted(listing(self.model_folder))]
            Ledger(self.out, self.name).commit(item, self.identity(item), files, Tally.zero())
            return f"{loss:.3f} nats a token"

        return work


def teach_captioner(session: Session, job: TeachJob, resources: Resources, progress: Progress) -> StoragePath:
    """Fine-tune it, unless the ledger has this very model; returns its folder."""
    run_stage(session, job, {STAGE: STAGE}, resources, progress, "teach the captioner")
    return job.model_folder
