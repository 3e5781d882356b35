"""VLMo's training, on texts alone and then on pairs, as recipes know it."""

from __future__ import annotations

from functools import partial
from typing import Literal

from pydantic import Field

from capfilt.objectives.kinds import TaskConfig, TaskKind, built_by, needs_of, not_cut

NEEDS = {**needs_of("itc", "mlm"), "itm": frozenset({"encode_image", "encode_text", "fuse"})}
"""Negatives of ITM are drawn by ITC."""


class WordObjectives(TaskConfig):
    """What both trainings say of MLM."""

    mask_rate: float = Field(default=0.15, gt=0, lt=1)
    """Share of the tokens that MLM hides, of texts padded to all positions of the model."""
    mean_over: Literal["rank", "all"] = "rank"
    """Of what MLM and ITM are the mean: of a process's own tokens and pairs, and then over processes, as released; or
    of those of all processes."""


class VlmoObjectives(WordObjectives):
    """Which losses are summed, and their constants; the defaults are those of the released code, on pairs."""

    task: Literal["vlmo"] = "vlmo"
    """The task's name."""
    losses: dict[Literal["itc", "itm", "mlm"], float] = Field(
        default={"itc": 1.0, "itm": 1.0, "mlm": 0.25}, min_length=1
    )
    """Weight of each."""
    gather_with_grad: bool = False
    """Whether features of other processes carry gradients back to them. As released they do not: averaged over W
    processes, ITC's gradient of everything but its scales is then 1 / W of that of one process on all pairs."""


class VlmoTextObjectives(WordObjectives):
    """MLM of texts alone (VLMo section 3.3, the second stage)."""

    reads_images = False

    task: Literal["vlmo-texts"] = "vlmo-texts"
    """The task's name."""
    losses: dict[Literal["mlm"], float] = Field(default={"mlm": 1.0}, min_length=1)
    """The weight of the loss."""


unsupported = partial(not_cut, batches="VLMo's batches")
VLMO = TaskKind(VlmoObjectives, built_by("vlmo.VlmoPretraining"), NEEDS, unsupported)
VLMO_TEXTS = TaskKind(VlmoTextObjectives, built_by("vlmo.VlmoTexts"), {"mlm": frozenset({"unmask"})}, unsupported)
