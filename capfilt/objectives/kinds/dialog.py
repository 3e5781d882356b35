"""Visual dialog, as recipes know it: a model learns which candidate answers a round, or to write the answer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from capfilt.objectives.kinds import TaskConfig, TaskKind, built_by, needs_of, not_cut

DialogLoss = Literal["rank", "lm"]


class DialogObjectives(TaskConfig):
    """Visual dialog (VisDial, arXiv 1611.08669) by what a pretrained model has: its head that matches texts with
    images, or its decoder. The candidates of a round are `train.loader.candidates`."""

    row_kind = "rounds"

    task: Literal["dialog"] = "dialog"
    """The task's name."""
    losses: dict[DialogLoss, float] = Field(default={"rank": 1.0}, min_length=1)
    """The weight of each: `rank` is the cross-entropy of the right candidate among those shown, by the log-odds that
    caption, history, question and candidate match the picture; `lm` that of its words, behind all the others."""


RANKS = {"rank": frozenset({"encode_image", "fuse"})}
DIALOG = TaskKind(DialogObjectives, built_by("dialog.DialogTask"), RANKS | needs_of("lm"), not_cut)
