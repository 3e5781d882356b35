"""What a training process is told: the one thing that crosses to it."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from capfilt.config import Config
from capfilt.data.loading.config import Source
from capfilt.data.text.language_tokenizer import tokenizer_of
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.inference.device import Compute
from capfilt.models import Architecture
from capfilt.models.checkpoints.initial_weights import InitialConfig
from capfilt.storage.paths import StoragePath
from capfilt.training.config import ExecutionConfig, TrainConfig

LOG = "log.jsonl"
PROGRESS = "features.json"
"""How many shards are done of the features of a frozen tower, beside a training's log."""
STATES = "states"
"""The folder of the states, each named by its step."""


class TrainJob(Config):
    """Everything that a training process needs to know."""

    out: StoragePath
    """Its folder: `log.jsonl`, `states/` while it runs, and in the end the model in `checkpoint/`."""
    architecture: Architecture
    start: StoragePath | None = None
    """A model folder to start from; parts that the architecture lacks are left behind. None: from scratch."""
    initial: InitialConfig = InitialConfig()
    """What the towers of a model from scratch begin with."""
    tokenizer: str
    sources: tuple[Source, ...] = Field(min_length=1)
    rows: StoragePath | None = None
    """A JSON that says how many `rows` each shard has, its sha256 (`contents`), and for steps on regions how many
    pictures of it have `regions`; None: every process counts before it begins."""
    train: TrainConfig
    compute: Compute
    execution: ExecutionConfig = ExecutionConfig()
    seed: int = 0

    @property
    def model_folder(self) -> StoragePath:
        """Where the finished model lies."""
        return self.out / "checkpoint"

    @property
    def best_folder(self) -> StoragePath:
        """Where the best one lies, if it was kept."""
        return self.out / "best"

    @property
    def features_folder(self) -> Path:
        """Where features are kept, if they are: never on a store, for they are mapped into memory."""
        kept = self.train.features
        if isinstance(kept, Path):
            return kept
        assert isinstance(self.out, Path), "whoever reads a recipe asks for a folder"
        return self.out.parent / "features"

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer of its texts: the language model's, if the architecture has one."""
        return tokenizer_of(self.tokenizer, self.architecture.tokenizer_kind)
