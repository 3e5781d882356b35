"""Visual dialog, as recipes know it: a model learns which candidate answers a round, or to write the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from capfilt.models.architecture import ArchitectureConfig
from capfilt.objectives.kinds import TaskConfig, TaskKind, built_by

if TYPE_CHECKING:
    from capfilt.data.loading.config import RowKind

DialogLoss = Literal["rank", "lm"]
NEEDS: dict[DialogLoss, frozenset[str]] = {
    "rank": frozenset({"encode_image", "fuse"}),
    "lm": frozenset({"encode_image", "decode"}),
}
"""The capabilities that each loss asks of a model."""


class DialogObjectives(TaskConfig):
    """Visual dialog (VisDial, arXiv 1611.08669) by what a pretrained model has: its head that matches texts with
    images, or its decoder. The candidates of a round are `train.loader.candidates`."""

    task: Literal["dialog"] = "dialog"
    """The task's name."""
    losses: dict[DialogLoss, float] = Field(default={"rank": 1.0}, min_length=1)
    """The weight of each: `rank` is the cross-entropy of the right candidate among those shown, by the log-odds that
    caption, history, question and candidate match the picture; `lm` that of its words, behind all the others."""

    @property
    def row_kind(self) -> RowKind:
        return "rounds"


def unsupported(architecture: ArchitectureConfig, config: DialogObjectives, micro_batches: int) -> str:
    """What does not go together, as a sentence; "" for nothing."""
    if micro_batches > 1:
        return f"micro_batches is {micro_batches}, and batches of this task are not cut: set it to 1."
    return ""


DIALOG = TaskKind(DialogObjectives, built_by("dialog.DialogTask"), NEEDS, unsupported)
