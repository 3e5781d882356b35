"""ALBEF's pretraining, as recipes know it."""

from __future__ import annotations

from functools import partial
from typing import Literal

from pydantic import Field

from capfilt.config import added
from capfilt.objectives.kinds import TaskConfig, TaskKind, built_by, needs_of, not_cut

AlbefObjective = Literal["itc", "itm", "mlm"]


class AlbefObjectives(TaskConfig):
    """Which losses are summed, and their constants; the defaults are the paper's (ALBEF sections 3.2 to 3.4)."""

    task: Literal["albef"] = "albef"
    """What the model is trained for: ALBEF's pretraining."""
    losses: dict[AlbefObjective, float] = Field(default={"itc": 1.0, "itm": 1.0, "mlm": 1.0}, min_length=1)
    """Weight of each; ALBEF sums them unweighted."""
    momentum: float = Field(default=0.995, ge=0, le=1)
    """Of its weights, what the momentum copy keeps at each step."""
    queue: int = Field(default=65536, ge=0)
    """Features kept from earlier steps as negatives; a multiple of the global batch."""
    alpha: float = Field(default=0.4, ge=0, le=1)
    """Final weight of the momentum copy's soft targets, in ITC and in MLM; 0: they are not distilled from."""
    alpha_ramp: float = Field(default=1 / 30, ge=0, le=1)
    """Share of training over which alpha grows from 0; ALBEF: the first of 30 epochs."""
    mask_rate: float = Field(default=0.15, gt=0, lt=1)
    """Share of the tokens that MLM hides."""
    itc_keys: Literal["rank", "all"] = "rank"
    """The keys of this step that ITC compares with: a process's own, as released, or those of all."""
    momentum_from: Literal["model", "start"] = added("model")
    """What the momentum copy and the queues begin with: the model and noise, or what the training that the model
    starts from ended with, as the published fine-tunings do; that training must have kept them (`keep_momentum`)."""
    mean_over: Literal["rank", "all"] = "rank"
    """Of what MLM and ITM are the mean: of a process's own tokens and pairs, and then over processes, as released; or
    of those of all processes."""

    @property
    def has_momentum(self) -> bool:
        """ITC compares with it, and MLM distils from it."""
        return True

    def check_batch(self, rows: int) -> None:
        if self.queue % rows:
            near = self.queue - self.queue % rows
            raise ValueError(f"objectives.queue {self.queue} is not a multiple of loader.batch_size {rows}; {near} is")


ALBEF = TaskKind(
    AlbefObjectives,
    built_by("albef.AlbefPretraining"),
    needs_of("itc", "itm", "mlm"),
    partial(not_cut, batches="ALBEF's batches"),
)
