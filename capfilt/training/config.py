"""The configuration of a training: how long and how, which model, which data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from capfilt.config import Config
from capfilt.data.images.augment import AugmentConfig
from capfilt.data.loading.config import LoaderConfig, Source
from capfilt.data.text.language_tokenizer import tokenizer_of
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.inference.config import Precision
from capfilt.inference.device import Compute
from capfilt.models import Architecture
from capfilt.models.checkpoints.initial_weights import InitialConfig
from capfilt.objectives.config import ObjectivesConfig
from capfilt.objectives.tasks import ObjectivesSection
from capfilt.storage.paths import StoragePath
from capfilt.training.distributed.data_parallel import ExecutionConfig
from capfilt.training.optimizer import OptimizerConfig

EXECUTION_FIELDS: dict[str, Any] = {
    **dict.fromkeys(("precision", "recompute", "checkpoint_every", "checkpoints", "skips", "log_every"), True),
    "loader": {"decoders": True},
}
"""What TrainConfig says of how a training goes and not of what it learns: it may go on with another answer. In the
place of `precision` stands the format that was chosen (`TrainJob.compute`). As what pydantic leaves out."""


class TrainConfig(Config):
    """How long and how a model is trained."""

    steps: int = Field(ge=1)
    image_size: int | None = Field(default=None, ge=1)
    """Picture size other than the architecture's: BLIP pretrains at 224 and fine-tunes at 384."""
    loader: LoaderConfig = LoaderConfig()
    objectives: ObjectivesSection = ObjectivesConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: Precision = "auto"
    """auto: bf16 where all workers have GPUs that multiply it in hardware, fp32 on CPUs; chosen once for a run."""
    recompute: int = Field(default=0, ge=0)
    """The last vision blocks that compute their activations again instead of keeping them: memory for time."""
    keep_momentum: bool = False
    """Leave the momentum copy and the queues beside the model, for a fine-tuning that goes on with them."""
    features: bool | Path = False
    """BLIP-2: keep what the frozen tower sees of each image on disk, and compute it once only: true (in `features/` of
    the run folder, or of the round) or a folder that several trainings share. An image takes N x D numbers in the
    format `frozen` of the architecture: 724 kB of ViT-g at 224 px. Not with pictures that are changed at random."""
    checkpoint_every: int = Field(default=500, ge=1)
    """Steps between two states on disk: what a kill costs at most."""
    checkpoints: int = Field(default=2, ge=1)
    """How many states are kept: should the newest be damaged, training goes on from the one before."""
    keep_best: bool = False
    """Keep the state before which the mean training loss was lowest beside the newest, and leave its model in `best/`.
    Not a held-out measure: evaluate both models to choose."""
    skips: int = Field(default=10, ge=0)
    """Steps in a row whose gradients are not finite that are left out before training stops; 0: the first stops it."""
    log_every: int = Field(default=20, ge=1)

    @field_validator("features", mode="before")
    @classmethod
    def _a_folder(cls, features: object) -> object:
        if isinstance(features, str) and "://" in features:
            raise ValueError(f"features are mapped into memory: give a folder that all workers see, not {features}")
        return features

    @model_validator(mode="after")
    def _objectives(self) -> TrainConfig:
        objectives = self.objectives
        objectives.check_batch(self.loader.batch_size)
        if not objectives.has_momentum and (self.keep_momentum or objectives.resumes_momentum):
            raise ValueError("without the objective itc there is no momentum copy to keep or to begin with")
        if self.features and self.loader.augment != AugmentConfig():
            raise ValueError("features are kept of pictures as they are; set loader.augment={} or features=false")
        return self


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
    """A JSON that says how many `rows` each shard has, and its sha256 (`contents`); None: every process counts the rows
    before it begins."""
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
        return tokenizer_of(self.tokenizer, self.architecture.language_kind)
