"""bench: how fast a stage is on this machine, with made-up models and pictures, where its time goes, and which share of
the floor is reached that arithmetic sets.

A measurement is boxed in time: how many pictures it takes is found while it warms up, unless `images` says it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from capfilt import config as configs
from capfilt import presets
from capfilt.config import Config
from capfilt.errors import RecipeError, UsageError
from capfilt.inference.config import AnnotateConfig, DecodeConfig, Precision
from capfilt.inference.roles import check_capabilities
from capfilt.models import ArchitectureConfig, read_architecture
from capfilt.objectives.tasks import PRETRAINING
from capfilt.runs.cost import Price
from capfilt.runs.progress import Progress

LOADING = "loading what computes"
SECONDS = 30.0
"""What is measured takes, about, where nobody says otherwise; loading torch and making models comes on top."""


class BenchConfig(Config):
    """What is measured of `annotate`."""

    model: str = "blip/small"
    """A preset of `models/`, or a YAML; its weights are random."""
    filter: str | None = None
    """Likewise of the filter; null: as `model`."""
    shared: bool = False
    """Whether captioner and filter are one model. CapFilt's are fine-tuned apart: an image passes two vision towers."""
    images: int = Field(default=0, ge=0)
    """Pictures of a repeat; 0: as many as fit into the time."""
    width: int = Field(default=640, ge=16)
    """Width of the pictures in the tar, pixels; they are three quarters as high."""
    captions: int = Field(default=1, ge=1, le=1000)
    tokens: int = Field(default=20, ge=4)
    """Tokens of every text that is written."""
    method: Literal["nucleus", "greedy", "beam"] = "nucleus"
    batch_size: int | None = Field(default=None, ge=1)
    """null: 16 on a CPU, 64 on a GPU; never more than the pictures of a repeat."""
    precision: Precision = "auto"
    capture: bool = False
    """Whether a GPU's decode steps are captured, as `annotate.capture`."""
    repeats: int = Field(default=5, ge=1)
    """Medians are of so many, or of fewer where the time is over."""
    compared: int = Field(default=0, ge=0)
    """On so many images bf16 and batches of one are held against fp32, which takes time of its own; 0: on none."""

    @property
    def rows(self) -> int:
        """Texts that grow at a time: captions, or beams."""
        return max(3, self.captions) if self.method == "beam" else self.captions

    def annotate(self, batch_size: int = 16) -> AnnotateConfig:
        beams = max(3, self.captions)
        decode = DecodeConfig(method=self.method, beams=beams, max_length=self.tokens + 1, min_length=self.tokens)
        return AnnotateConfig(
            captions=self.captions,
            decode=decode,
            batch_size=self.batch_size or batch_size,
            precision=self.precision,
            capture=self.capture,
        )


class BenchTrainConfig(Config):
    """What is measured of a training: the pretraining of a family, with its published losses."""

    model: str = "blip/small"
    """A preset of `models/`, or a YAML; its weights are random."""
    batch_size: int | None = Field(default=None, ge=2)
    """Pairs of a step; null: 8 on a CPU, 64 on a GPU."""
    width: int = Field(default=640, ge=16)
    """Width of the pictures in the tar, pixels; they are three quarters as high."""
    tokens: int = Field(default=30, ge=4)
    """Tokens of every text."""
    precision: Precision = "auto"
    micro_batches: int = Field(default=1, ge=1)
    """In how many chunks a step goes through its batch."""
    compile: bool = False
    """Whether blocks are compiled."""


class BenchDownloadConfig(Config):
    """What is measured of `download`: one worker, fetching from a server on this machine."""

    urls: int = Field(default=0, ge=0)
    """Pictures of a repeat, which are a shard; 0: as many as fit into the time."""
    width: int = Field(default=480, ge=16)
    """Width of the pictures, pixels; they are three quarters as high."""
    resize_mode: Literal["no", "border", "keep_ratio"] = "no"
    """As of `download`; "no": the bytes as they were served."""
    image_size: int = Field(default=256, gt=0)
    """As of `download`."""
    thread_count: int = Field(default=64, ge=1, le=1024)
    """Connections at once."""
    repeats: int = Field(default=5, ge=1)
    """Medians are of so many, or of fewer where the time is over."""


CONFIGS: dict[str, type[Config]] = {
    "annotate": BenchConfig,
    "train": BenchTrainConfig,
    "download": BenchDownloadConfig,
}


def run(
    stage: str, sets: Sequence[str], show: Progress, price: Price | None = None, seconds: float = SECONDS
) -> dict[str, Any]:
    """The verb: measure a stage for about so many seconds; the answer is the whole record, with a price also what a
    million images cost."""
    if stage not in CONFIGS:
        raise UsageError(f"there is no benchmark of {stage!r}; there are: {', '.join(CONFIGS)}.")
    config = configs.build(CONFIGS[stage], sets)
    with tempfile.TemporaryDirectory(prefix="capfilt-bench-") as scratch:
        # torch: not before the settings are checked
        if isinstance(config, BenchConfig):
            pair = _architecture(config.model), _architecture(config.filter or config.model)
            if config.shared and config.filter not in (None, config.model):
                raise RecipeError("shared=true is one model in both roles, and filter names another: leave one out.")
            check_capabilities("captioner", config.model, pair[0].capabilities)
            check_capabilities("filter", config.filter or config.model, pair[1].capabilities)
            _check_tokens(config.model, pair[0], config.tokens, 1)
            with show.wait(LOADING):
                from capfilt.pipelines.bench.annotate import bench_annotate
            return bench_annotate(config, pair, Path(scratch), show, seconds, price)
        if isinstance(config, BenchDownloadConfig):
            from capfilt.pipelines.bench.download import bench_download

            return bench_download(config, Path(scratch), show, seconds, price)
        assert isinstance(config, BenchTrainConfig)
        architecture = _architecture(config.model)
        if architecture.family not in PRETRAINING:
            raise RecipeError(
                f"{config.model} is of the family {architecture.family}, which is not pretrained; families that are:"
                f" {', '.join(PRETRAINING)}."
            )
        _check_tokens(config.model, architecture, config.tokens, 0)
        with show.wait(LOADING):
            from capfilt.pipelines.bench.train import bench_train
        return bench_train(config, architecture, Path(scratch), show, seconds, price)


def _check_tokens(model: str, architecture: ArchitectureConfig, tokens: int, before: int) -> None:
    """RecipeError where a text of so many tokens, behind `before` others, is longer than the model can read."""
    if before + tokens > (most := architecture.max_positions):
        raise RecipeError(f"tokens is {tokens}, and {model} has {most} positions: set tokens={most - before} at most.")


def _architecture(model: str) -> ArchitectureConfig:
    architecture = read_architecture(presets.find("models", model))
    if kind := architecture.language_kind:
        raise UsageError(f"bench makes up no vocabulary of {kind}: give a model without a language model of its own.")
    return architecture
