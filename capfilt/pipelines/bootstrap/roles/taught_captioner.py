"""captioner: a vision-language model that is fine-tuned on the human pairs, once for a run (a step, not a verb)."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from capfilt.inference.device import Compute
from capfilt.pipelines.bootstrap.roles.model_job import ModelJob
from capfilt.runs.ledger import fingerprint
from capfilt.storage.local_copies import local_copy
from capfilt.storage.paths import StoragePath
from capfilt.training.config import TeachCaptionerConfig


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
