"""The floor of a benchmark: the time that its products alone would take at the rate at which this machine multiplies.

The rate is that of one square product, measured between the repeats, so that a busy machine slows both. What reads more
than it multiplies, as a decoder does that writes a token at a time, cannot come near this floor.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from capfilt.evaluation import speed
from capfilt.models import ArchitectureConfig, Model, blank
from capfilt.models.layers.image_context import ImageContext
from capfilt.training.flops import peak_flops

SIDE = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the product: 2.1 GFLOP and 1.1 TFLOP, in which a machine of the kind reaches its rate."""


@dataclass(frozen=True)
class AnnotateLoad:
    """What is computed of an image."""

    captioner: ArchitectureConfig
    filter: ArchitectureConfig
    shared_vision: bool
    shared_context: bool
    rows: int
    """Texts that grow at a time: captions, or beams."""
    captions: int
    tokens: int
    """Tokens of a text that is written."""
    scored_tokens: int
    """Tokens of a text that is scored, on average: one came with the image."""


@dataclass
class MachineRate:
    """How fast this machine multiplies in a format, measured now and then."""

    device: torch.device
    dtype: torch.dtype
    seconds: list[float] = field(default_factory=list)
    """Of each product so far."""

    def measure(self, times: int = 3) -> None:
        """Multiply a few times."""
        side = SIDE[self.device.type]
        x = torch.randn(side, side, device=self.device).to(self.dtype)
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            if not self.seconds:
                x @ x
            self.seconds += [speed.seconds(self.device, lambda: x @ x) for _ in range(times)]

    @property
    def flops(self) -> float:
        """FLOP/s: the median."""
        return 2 * SIDE[self.device.type] ** 3 / statistics.median(self.seconds)

    def figures(self) -> dict[str, float]:
        """The rate, and that of the data sheet where the GPU's is known."""
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""
        sheet = peak_flops(gpu, self.dtype)
        return {"matmul_gflops": self.flops / 1e9, **({"data_sheet_gflops": sheet / 1e9} if sheet else {})}


def floor_figures(rate: MachineRate, flops: Mapping[str, float], seconds: Mapping[str, float]) -> dict[str, Any]:
    """The floor of one image, from FLOPs by phase, and which share of it is reached: of each phase whose seconds an
    image are known, and of `all`."""
    total = sum(flops.values())
    needed = {name: count / rate.flops for name, count in {**flops, "all": total}.items()}
    return {
        **rate.figures(),
        "gflop_an_image": {name: count / 1e9 for name, count in flops.items()},
        "images_per_second": rate.flops / total,
        "reached": {name: needed[name] / spent for name, spent in seconds.items() if needed.get(name) and spent},
    }


def annotate_flops(load: AnnotateLoad) -> dict[str, float]:
    """FLOPs of an image by phase; counted on tensors that have shapes and no numbers, a multiplication and an addition
    as two."""
    one, two = load.captioner, load.filter
    captioner, filter_ = (blank(architecture).eval().requires_grad_(False) for architecture in (one, two))
    with FakeTensorMode(allow_non_fake_inputs=True):
        captioner.to_empty(device="cpu")
        filter_.to_empty(device="cpu")
        vision, tokens = _count(lambda: captioner.encode_image(_picture(one)))
        before, context = _count(lambda: captioner.image_context(tokens, "decoder"))
        ids = torch.ones(load.rows, load.tokens, dtype=torch.long)
        caption = _count(lambda: captioner.decode(ids, None, context.repeat_interleave(load.rows)))[0]
        again = vision
        if (one.family, one.image_size, one.towers.get("vision")) != (
            two.family,
            two.image_size,
            two.towers.get("vision"),
        ):
            again, tokens = _count(lambda: filter_.encode_image(_picture(two)))
        keys = 0.0
        if "fuse" in two.capabilities:
            keys, context = _count(lambda: filter_.image_context(tokens, "encoder"))
        text = torch.ones(1, min(load.scored_tokens, two.max_positions), dtype=torch.long)
        score = (1 + load.captions) * _count(lambda: _score(filter_, text, context))[0]
    return {
        "vision": vision + (0.0 if load.shared_vision else again),
        "caption": before + caption,
        "score": score + (0.0 if load.shared_context else keys),
    }


def _score(model: Model, ids: Tensor, context: ImageContext) -> None:
    """What a filter computes of a text beside an image; of the last layer a little more than it needs."""
    mask = torch.ones_like(ids)
    if "encode_text" in model.capabilities:
        model.project_text(model.encode_text(ids, mask))
    if "fuse" in model.capabilities:
        model.match(model.fuse(ids, mask, context))


def _picture(architecture: ArchitectureConfig) -> Tensor:
    return torch.zeros(1, 3, architecture.image_size, architecture.image_size)


def _count(work: Callable[[], Any]) -> tuple[float, Any]:
    # The counter knows some kernels of fused attention only; written out, it is products like any others.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        made = work()
    return float(counter.get_total_flops()), made
