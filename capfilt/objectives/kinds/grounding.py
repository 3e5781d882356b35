"""Where in a picture a phrase is, as recipes know it: a model's head for boxes is fine-tuned."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from capfilt.objectives.kinds import TaskConfig, TaskKind, built_by, not_cut

BoxLoss = Literal["box", "giou"]
_NEEDS = frozenset({"encode_image", "fuse", "ground"})


class GroundingObjectives(TaskConfig):
    """The box of a phrase by the head of X-VLM's pretraining (X-VLM section 4.3, RefCOCO+): L1 and generalised IoU."""

    row_kind = "phrases"

    task: Literal["grounding"] = "grounding"
    """The task's name."""
    losses: dict[BoxLoss, float] = Field(default={"box": 1.0, "giou": 1.0}, min_length=1)
    """The weight of each: `box` is L1, summed over the four numbers, `giou` is 1 - generalised IoU."""


GROUNDING = TaskKind(GroundingObjectives, built_by("grounding.Grounding"), {"box": _NEEDS, "giou": _NEEDS}, not_cut)
