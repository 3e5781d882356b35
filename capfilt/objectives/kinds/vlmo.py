"""VLMo's training, on texts alone and then on pairs, as recipes know it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from capfilt.models.vlmo.config import VlmoConfig
from capfilt.objectives.kinds import TaskConfig, TaskKind, built_by

if TYPE_CHECKING:
    pass

NEEDS: dict[Literal["itc", "itm", "mlm"], frozenset[str]] = {
    "itc": frozenset({"encode_image", "encode_text"}),
    "itm": frozenset({"encode_image", "encode_text", "fuse"}),
    "mlm": frozenset({"encode_image", "unmask"}),
}
"""The capabilities that each objective asks of a model; negatives of ITM are drawn by ITC."""


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

    task: Literal["vlmo-texts"] = "vlmo-texts"
    """The task's name."""
    losses: dict[Literal["mlm"], float] = Field(default={"mlm": 1.0}, min_length=1)
    """The weight of the loss."""

    @property
    def reads_images(self) -> bool:
        return False


def unsupported(architecture: VlmoConfig, config: TaskConfig, micro_batches: int) -> str:
    """What does not go together, as a sentence; "" for nothing."""
    if micro_batches > 1:
        return f"micro_batches is {micro_batches}, and VLMo's batches are not cut: set it to 1."
    return ""


VLMO = TaskKind(VlmoObjectives, built_by("vlmo.VlmoPretraining"), NEEDS, unsupported)
VLMO_TEXTS = TaskKind(VlmoTextObjectives, built_by("vlmo.VlmoTexts"), {"mlm": frozenset({"unmask"})}, unsupported)
