"""How fast a training is beside what its device could do: model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B).

Counted are the products of the forward and the backward pass of the model and of the momentum copy's forward pass;
what is computed a second time to spare memory is not. On a device whose peak is not known there is no utilisation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from capfilt.models import Architecture, blank
from capfilt.objectives.collectives import alone, world_size
from capfilt.objectives.draws import Draws
from capfilt.objectives.kinds import TaskConfig
from capfilt.objectives.masking import MASKED, Masked
from capfilt.objectives.tasks import build_task
from capfilt.training.job import TrainJob

T = TypeVar("T")

PEAKS = {
    "A100": {torch.bfloat16: 312e12, torch.float32: 19.5e12},
    "H100 PCIe": {torch.bfloat16: 756e12, torch.float32: 51e12},
    "H100": {torch.bfloat16: 989e12, torch.float32: 67e12},
    "H200": {torch.bfloat16: 989e12, torch.float32: 67e12},
    "L40S": {torch.bfloat16: 362e12, torch.float32: 91.6e12},
    "A10": {torch.bfloat16: 125e12, torch.float32: 31.2e12},
    "L4": {torch.bfloat16: 121e12, torch.float32: 30.3e12},
    "RTX 4090": {torch.bfloat16: 165e12, torch.float32: 82.6e12},
}
"""Peak FLOP/s of dense products by words of a GPU's name, the first that fits (NVIDIA's data sheets, SXM where nothing
else is said; bf16 with fp32 sums, fp32 without TF32)."""


class Speed:
    """What a training's figures say of the device."""

    def __init__(self, job: TrainJob, device: torch.device):
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        # With features on disk the frozen tower, most of what would be counted, is not run.
        self.peak = None if job.train.features else peak_flops(gpu, job.compute.dtype)
        self.flops = 0
        if self.peak:  # counting takes seconds
            pairs = job.train.loader.batch_size // world_size()
            self.flops = step_flops(job.architecture, job.train.objectives, pairs, job.train.loader.max_length)

    def metrics(self, steps: int, seconds: float) -> dict[str, float]:
        """Utilisation of this process's device over `steps`; nothing where its peak is not known."""
        return {"mfu": round(steps * self.flops / seconds / self.peak, 4)} if self.peak else {}


def peak_flops(gpu: str, dtype: torch.dtype) -> float | None:
    """FLOP/s that a GPU of this name can do at most in this format; None where the table has it not."""
    words = gpu.replace("-", " ").split()  # NVIDIA A100-SXM4-80GB, NVIDIA H100 80GB HBM3
    if "NVL" in words:
        return None
    return next((peaks[dtype] for name, peaks in PEAKS.items() if all(word in words for word in name.split())), None)


class _NothingMasked(Draws):
    """Leaves texts as they are: which tokens are hidden changes no product, and cannot be drawn from ids without
    numbers."""

    def __init__(self, ids_BT: Tensor):
        self.ids_BT = ids_BT

    def take(self, name: str, draw: Callable[[], T]) -> T:
        """What `draw` draws, but of masks."""
        return draw() if name != MASKED else cast(T, Masked(self.ids_BT, self.ids_BT))


def step_flops(architecture: Architecture, objectives: TaskConfig, pairs: int, tokens: int) -> int:
    """FLOPs of a step of `pairs` texts of `tokens` each, counted on tensors that have shapes and no numbers."""
    with torch.device("meta"):
        task = build_task(blank(architecture), objectives).eval()  # in training a queue would ask where it is
    with FakeTensorMode(allow_non_fake_inputs=True), alone():
        task.to_empty(device="cpu")
        batch = task.example(pairs, tokens)
        task.draws = _NothingMasked(batch.ids_BT)
        # Of fused attention the counter knows some kernels only; written out, it is products like any others.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            losses, _ = task(batch, 0.0)
            task.total(losses).backward()
    return int(counter.get_total_flops())
