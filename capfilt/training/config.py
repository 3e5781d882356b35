"""The configuration of a training: how long and how, which model, which data."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from capfilt.config import Config, added
from capfilt.data.images.augment import AugmentConfig
from capfilt.data.loading.config import LoaderConfig
from capfilt.inference.config import Precision
from capfilt.objectives.config import ObjectivesConfig
from capfilt.objectives.tasks import ObjectivesSection

EXECUTION_FIELDS: dict[str, Any] = {
    **dict.fromkeys(("precision", "recompute", "checkpoint_every", "checkpoints", "skips", "log_every"), True),
    "loader": {"decoders": True},
}
"""What TrainConfig says of how a training goes and not of what it learns: it may go on with another answer. In the
place of `precision` stands the format that was chosen (`TrainJob.compute`). As what pydantic leaves out."""


class OptimizerConfig(Config):
    """AdamW with warm-up and decay. BLIP section 4.1: peak 3e-4, weight decay 0.05, on every parameter.

    BLIP's decay is "exponential": x `rate` after each of 20 epochs, 0.9 in the released configuration, 0.85 in the
    paper. That is a third of the last epoch's rate: 4.1e-5 against 1.4e-5.
    """

    lr: float = Field(default=3e-4, gt=0)
    """Peak learning rate."""
    min_lr: float = Field(default=1e-6, ge=0)
    """Where the cosine ends; below it the exponential never falls."""
    warmup: float = Field(default=0.02, ge=0, lt=1)
    """Share of the steps over which the rate grows linearly from `warmup_lr`."""
    warmup_lr: float = Field(default=0.0, ge=0)
    """Where the warm-up begins; BLIP: 1e-6."""
    warmup_first: Literal[1, 0] = added(1)
    """The number of the first step of the warm-up: 1, and the last of W steps has the peak; or 0 as in the released
    codes of BLIP and LAVIS, whose first step is at `warmup_lr`, and whose warm-up ends with the first of `epochs`."""
    warmup_hold: int = added(1, ge=1)
    """How many steps each rate of the warm-up holds. In ALBEF's released code, which warms up as with `warmup_first` 0
    and sets the rate behind a step, 100, and the first rate holds for one more."""
    decay: Literal["cosine", "epoch_cosine", "exponential", "constant", "linear"] = "cosine"
    """"epoch_cosine" is the cosine of BLIP's fine-tuning: one rate for each of `epochs`, and no warm-up in it;
    "linear" falls to `min_lr` evenly (ViLT, VLMo, X-VLM)."""
    rate: float = Field(default=0.9, gt=0, le=1)
    """Exponential: what the learning rate is multiplied by after each epoch."""
    epochs: int = Field(default=20, ge=1)
    """Exponential and epoch_cosine: how many epochs the steps are; within one the rate stays."""
    weight_decay: float = Field(default=0.05, ge=0)
    """AdamW's, decoupled from the gradient."""
    decay_vectors: bool = True
    """Whether biases, norms and other vectors decay too: in BLIP's code they do, in BLIP-2's not."""
    decay_scalars: bool | None = added(None)
    """Whether single numbers decay, as the temperature is; null: as vectors do. In BLIP-2's code they do."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the means of gradients and of their squares; BLIP-2: [0.9, 0.98]."""
    eps: float = added(1e-8, gt=0)
    """What is added to the root of the second moment; CLIP: 1e-6."""
    adamw: Literal["torch", "transformers"] = added("torch")
    """Whose AdamW: torch's, or that of transformers before version 5 (ViLT, VLMo, X-VLM), which adds epsilon before the
    second moment is corrected for its bias, and lets weights decay after they were moved."""
    head_rate: float = added(1.0, gt=0)
    """What the learning rate is multiplied by for a fresh head on a base; ViLT's VQA has 10, VLMo's 20."""
    fresh_rate: float = added(1.0, gt=0)
    """Likewise for every weight that begins at random where others come from a checkpoint, of `initial` or `start`:
    cross-attention, heads, temperature. X-VLM: 2."""
    clip: float = Field(default=0.0, ge=0)
    """Largest global gradient norm; 0 = no clipping, as in BLIP."""


class ExecutionConfig(Config):
    """How steps are computed. What is learned does not depend on it, so a training may go on with other settings."""

    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Whether every process holds all weights, or each its share of weights, gradients and optimizer (FSDP2)."""
    compile: bool = False
    """Compile the blocks of the transformers with torch.compile; the first steps wait for the compiler."""
    micro_batches: int = Field(default=1, ge=1)
    """In how many chunks a process goes through its share of a batch: memory for time. The loss is that of the whole
    batch all the same (`objectives/grad_cache.py`)."""
    deterministic: bool = False
    """Take kernels only that give the same bits each time, and refuse where there are none. On CPUs trainings are
    reproducible without it; on GPUs it costs speed (`training/deterministic.py`)."""


class TrainResources(ExecutionConfig):
    """The processes that train together, and how each goes through a step."""

    workers: int = Field(default=1, ge=1)
    """Processes; the global batch is split evenly over them."""
    cpus: float = Field(default=1, gt=0)
    """CPUs of each; a process computes with as many threads."""
    gpus: int = Field(default=0, ge=0, le=1)
    """GPUs of each: none or one."""


class TrainConfig(Config):
    """How long and how a model is trained."""

    steps: int = Field(ge=1)
    """Updates of the weights, each on one global batch."""
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
    """Steps between two lines of `log.jsonl`, whose figures are means over them."""

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


class TeachConfig(Config):
    """How long a language model reads."""

    steps: int = Field(default=1000, ge=0)
    """Updates of the language model's weights."""
    batch_size: int = Field(default=32, ge=1)
    """Rows a step, each as long as the model has positions."""
    lr: float = Field(default=3e-3, gt=0)
    """Peak; from there it falls linearly to 0."""


class SmallVlmConfig(Config):
    """The shape of a new vision-language model, LLaVA's in miniature: CLIP's vision tower, two linear layers, a Llama.
    For the embedded world and for tests; what is to know real pictures begins with a published model."""

    image_size: int = Field(default=32, ge=1)
    """Side of a picture in pixels; a multiple of `patch_size`."""
    patch_size: int = Field(default=8, ge=1)
    """Side of a patch in pixels."""
    width: int = Field(default=96, ge=8)
    """Of both towers; a multiple of `heads`."""
    vision_depth: int = Field(default=3, ge=1)
    """Layers of the vision tower."""
    text_depth: int = Field(default=2, ge=1)
    """Layers of the language model."""
    heads: int = Field(default=4, ge=1)
    """Attention heads of both towers."""
    vocabulary: int = Field(default=512, ge=300)
    """Tokens of a byte-level BPE that is learned from the texts, at most."""
    positions: int = Field(default=256, ge=64)
    """Tokens of picture, prompt and text together."""

    @model_validator(mode="after")
    def _divisible(self) -> SmallVlmConfig:
        if self.image_size % self.patch_size or self.width % self.heads:
            raise ValueError("image_size must be a multiple of patch_size, and width of heads")
        return self


class TeachCaptionerConfig(Config):
    """How a vision-language model of transformers is fine-tuned to write captions like those of the human pairs."""

    start: str | None = None
    """The model to begin with: a folder of transformers, or a name on the Hugging Face hub. null: a new one."""
    shape: SmallVlmConfig = SmallVlmConfig()
    """Of a new model."""
    steps: int = Field(default=400, ge=1)
    """Updates of all weights."""
    batch_size: int = Field(default=32, ge=1)
    """Pictures a step, each with one of its texts."""
    lr: float = Field(default=2e-3, gt=0)
    """Peak, after a warm-up of a twentieth of the steps; from there it falls linearly to 0. For a published model take
    1e-5 to 5e-5."""
    max_tokens: int = Field(default=64, ge=1)
    """Tokens of a text; longer ones are not learned from."""
    precision: Precision = "auto"
    """As of a training."""

    @model_validator(mode="after")
    def _one_beginning(self) -> TeachCaptionerConfig:
        if self.start is not None and self.shape != SmallVlmConfig():
            raise ValueError("start and shape both say what the model is; give one of them")
        return self
