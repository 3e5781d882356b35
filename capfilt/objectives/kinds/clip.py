"""CLIP's pretraining and fine-tuning, as recipes know them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from capfilt.models.clip.config import CAPABILITIES, ClipConfig
from capfilt.objectives.kinds import TaskConfig, TaskKind, built_by


class ClipObjectives(TaskConfig):
    """The contrastive loss and its constants; the defaults are those of open_clip's large runs."""

    task: Literal["clip"] = "clip"
    """The task's name."""
    losses: dict[Literal["itc"], float] = Field(default={"itc": 1.0}, min_length=1)
    """The weight of the loss."""
    local_loss: bool = True
    """Whether a process takes the loss of its own rows against all columns, or as all processes do of all rows."""
    gather_with_grad: bool = True
    """Whether features of other processes carry gradients back to them (`objectives/losses/info_nce.py`)."""
    itc_targets: Literal["pair", "image"] = "pair"
    """What a row asks for: the pair alone, as CLIP, or whatever of the batch is of the same image."""
    max_scale: float = Field(default=100.0, ge=1)
    """What cosines are multiplied by at most; the logarithm of the learned scale is kept in [0, ln of this]."""


def unsupported(architecture: ClipConfig, config: ClipObjectives, micro_batches: int) -> str:
    """What does not go together, as a sentence; "" for nothing."""
    if config.local_loss and not config.gather_with_grad:
        return (
            "objectives.local_loss without gather_with_grad has a gradient of another direction than that of the batch "
            "where there are several processes: set gather_with_grad=true, or local_loss=false."
        )
    return ""


CLIP = TaskKind(ClipObjectives, built_by("clip.ClipPretraining"), {"itc": CAPABILITIES}, unsupported)
