"""language: a small language model for BLIP-2's second stage, trained on the texts of shards (a step, not a verb)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from capfilt.data import shards
from capfilt.data.sample import Sample
from capfilt.data.text.tokenizer import clean_caption
from capfilt.models.blip2.config import LanguageConfig
from capfilt.pipelines.bootstrap.roles.model_job import ModelJob
from capfilt.runs.ledger import fingerprint
from capfilt.training.config import TeachConfig


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
