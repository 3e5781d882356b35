"""ViLT's pretraining and fine-tuning, as recipes know them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from capfilt.objectives.kinds import TaskConfig, TaskKind

if TYPE_CHECKING:
    from capfilt.models.vilt.model import Vilt
    from capfilt.objectives.interface import Task

Objective = Literal["mlm", "itm", "wpa"]

NEEDS: dict[Objective, frozenset[str]] = {
    "mlm": frozenset({"encode_image", "unmask"}),
    "itm": frozenset({"encode_image", "fuse"}),
    "wpa": frozenset({"encode_image", "fuse"}),
}
"""The capabilities that each objective asks of a model."""


class ViltObjectives(TaskConfig):
    """Which losses are summed, and their constants; the defaults are those of ViLT's pretraining."""

    task: Literal["vilt"] = "vilt"
    """That these are ViLT's objectives."""
    losses: dict[Objective, float] = Field(default={"mlm": 1.0, "itm": 1.0, "wpa": 0.1}, min_length=1)
    """Weight of each; wpa is taken of the pairs of itm."""
    mask_rate: float = Field(default=0.15, gt=0, lt=1)
    """Share of the tokens that MLM hides, in whole words."""
    mask_positions: int = Field(default=40, ge=4)
    """How long a text is with its padding, which takes its share of the hidden tokens (`whole_words`)."""
    max_patches: int = Field(default=200, ge=0)
    """Patches of a picture that are read, drawn anew for each pass where it has more; 0: all. Half of 400 in the
    paper's largest pictures; evaluation reads all."""
    mean_over: Literal["rank", "all"] = "rank"
    """Of what MLM is the mean: of a process's own hidden tokens, and then over processes (ViLT's code), or of those of
    all processes, which does not depend on how many there are."""

    @property
    def match_share(self) -> float:
        """The share of ITM's pairs that match."""
        return 1 / 2


def build(model: Vilt, config: ViltObjectives, prompt: int = 0) -> Task:
    """What trains a ViLT."""
    from capfilt.objectives.tasks.vilt import ViltPretraining

    return ViltPretraining(model, config, prompt)


VILT = TaskKind(ViltObjectives, build, NEEDS)
