"""bench: how fast a stage is on this machine, with made-up models and pictures, and where its time goes."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from capfilt import config as configs
from capfilt import presets
from capfilt.config import Config
from capfilt.errors import UsageError
from capfilt.inference.config import AnnotateConfig, DecodeConfig, Precision
from capfilt.models import BlipConfig
from capfilt.runs.cost import Price
from capfilt.runs.progress import Progress

STAGES = ("annotate",)


class BenchConfig(Config):
    """What is measured."""

    model: str = "blip/small"
    """A preset of `models/`, or a YAML; its weights are random."""
    shared: bool = False
    """Whether captioner and filter are one model. CapFilt's are fine-tuned apart: an image passes two vision towers."""
    images: int = Field(default=64, ge=1)
    width: int = Field(default=640, ge=16)
    """Width of the pictures in the tar, pixels; they are three quarters as high."""
    captions: int = Field(default=1, ge=1, le=1000)
    tokens: int = Field(default=20, ge=4)
    """Tokens of every text that is written."""
    method: Literal["nucleus", "greedy", "beam"] = "nucleus"
    batch_size: int = Field(default=16, ge=1)
    precision: Precision = "auto"
    repeats: int = Field(default=5, ge=1)
    """Medians are of so many."""
    compared: int = Field(default=16, ge=2)
    """On so many images bf16 and batches of one are held against fp32; fp32 runs of them cost time too."""

    def annotate(self) -> AnnotateConfig:
        beams = max(3, self.captions)
        decode = DecodeConfig(method=self.method, beams=beams, max_length=self.tokens + 1, min_length=self.tokens)
        return AnnotateConfig(
            captions=self.captions, decode=decode, batch_size=self.batch_size, precision=self.precision
        )


def run(stage: str, sets: Sequence[str], show: Progress, price: Price | None = None) -> dict[str, Any]:
    """The verb: measure a stage; the answer is the whole record, with a price also what a million images cost."""
    if stage not in STAGES:
        raise UsageError(f"there is no benchmark of {stage!r}; there are: {', '.join(STAGES)}.")
    config = configs.build(BenchConfig, sets)
    architecture = configs.read(presets.find("models", config.model), BlipConfig)
    from capfilt.pipelines.bench.annotate import bench_annotate  # torch: not before the settings are checked

    with tempfile.TemporaryDirectory() as scratch:
        return bench_annotate(config, architecture, Path(scratch), show, price)
