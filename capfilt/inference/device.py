"""Where a command computes and in which number format: chosen once, from what its workers have, and handed to all.

"auto" is fp32 on a CPU, whatever its instruction set, and bf16 on GPUs that multiply it in hardware, all of them.
A worker never chooses: it opens what was chosen or refuses.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from capfilt.config import Config
from capfilt.errors import ClusterError
from capfilt.inference.config import DeviceKind, Format, Precision

if TYPE_CHECKING:
    import torch


class Compute(Config):
    """The kind of device and the format of matrix products that all workers of a stage use."""

    device: DeviceKind
    precision: Format

    @property
    def dtype(self) -> torch.dtype:
        import torch

        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def open(self) -> torch.device:
        """This process's device. ClusterError where it has none of the kind, or none that computes in the format."""
        import torch

        if self.device == "cpu":
            return torch.device("cpu")
        if not torch.cuda.is_available():
            raise ClusterError(
                f"the worker on {socket.gethostname()} has no CUDA device that torch can use, and this was to be"
                " computed on GPUs: give each worker one (gpus=1), or install a torch with CUDA there."
            )
        if self.precision == "bf16" and not torch.cuda.is_bf16_supported():
            raise ClusterError(
                f"the worker on {socket.gethostname()} cannot compute in bf16 ({torch.cuda.get_device_name()}):"
                " leave that node out, or set precision=fp32."
            )
        # fp32 is fp32 in every product: TF32 has 10 bits of fraction, and torch takes it for convolutions by default.
        torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
        return torch.device("cuda", torch.cuda.current_device())


@dataclass(frozen=True)
class Ability:
    """What a process can compute with."""

    device: DeviceKind
    name: str
    """The host, and the GPU's name."""
    bf16: bool
    """Whether a GPU multiplies it in hardware. torch also emulates it (V100, T4), slower than fp32."""


def local_device() -> DeviceKind:
    """The kind of device that this process computes on where no cluster hands any out: a GPU if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def ability() -> Ability:
    """What this process can compute with."""
    import torch

    if local_device() == "cpu":
        return Ability("cpu", socket.gethostname(), bf16=False)
    name = f"{torch.cuda.get_device_name()} on {socket.gethostname()}"
    return Ability("cuda", name, torch.cuda.is_bf16_supported(including_emulation=False))


def choose(precision: Precision, device: DeviceKind, abilities: Sequence[Ability] = ()) -> tuple[Compute, str]:
    """What all workers compute with, and a line for people where that is not what each alone would take, or "".

    `abilities` are those of the workers' nodes; of CPUs nothing need be known. ClusterError where GPUs are wanted and a
    node's process has none.
    """
    if device == "cpu" or precision != "auto":
        return Compute(device=device, precision="bf16" if precision == "bf16" else "fp32"), ""
    if without := [one.name for one in abilities if one.device == "cpu"]:
        raise ClusterError(
            f"a worker that was given a GPU on {without[0]} finds none: torch there is for CPUs, or the driver is"
            " missing. Install a torch with CUDA, or set gpus=0."
        )
    slow = [one.name for one in abilities if not one.bf16]
    if abilities and not slow:
        return Compute(device=device, precision="bf16"), ""
    if len(slow) == len(abilities):
        return Compute(device=device, precision="fp32"), "" if abilities else "fp32: no node with a GPU answered"
    which = f"{len(slow)} of {len(abilities)} nodes (first {slow[0]})"
    return Compute(device=device, precision="fp32"), f"fp32, since {which} have no bf16 units and all take the same"


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """Run matrix products in `dtype`; norms, softmax and losses stay in fp32."""
    import torch

    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)
