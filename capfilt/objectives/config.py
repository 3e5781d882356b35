"""ITC, ITM and LM: which of them a training minimises, and their constants."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from capfilt.config import added
from capfilt.objectives.kinds import TaskConfig, needs_of

Objective = Literal["itc", "itm", "lm"]

SMOOTHING = 0.1
"""Label smoothing of LM (BLIP section 3.2)."""
EPSILON = 1e-4
"""Added to each hard negative's probability (BLIP's pretraining), so that a confident row does not underflow."""

NEEDS = needs_of("itc", "itm", "lm")


class ObjectivesConfig(TaskConfig):
    """Which losses are summed, and their constants; the defaults are the paper's."""

    losses: dict[Objective, float] = Field(default={"itc": 1.0, "itm": 1.0, "lm": 1.0}, min_length=1)
    """Weight of each; BLIP sums them unweighted."""
    momentum: float = Field(default=0.995, ge=0, le=1)
    """What the momentum copy keeps of itself in a step; the rest is the model's."""
    queue: int = Field(default=57600, ge=0)
    """Features kept from earlier steps as negatives; a multiple of the global batch."""
    alpha: float = Field(default=0.4, ge=0, le=1)
    """Final weight of the soft targets."""
    alpha_ramp: float = Field(default=0.1, ge=0, le=1)
    """Share of training over which alpha grows from 0; BLIP: 2 of 20 epochs."""
    itc_targets: Literal["pair", "image"] = "pair"
    """What ITC asks for: the pair alone (BLIP's pretraining), or whatever is of the same image, in the queue too (its
    retrieval fine-tuning)."""
    itc_keys: Literal["all", "rank", "detached"] = added("all")
    """The keys of this step that ITC compares with: those of all processes, in BLIP-2 with their gradients; or as in
    the released codes, in BLIP's a process's own ("rank"), in BLIP-2's those of all without gradients ("detached")."""
    negatives: Literal["rank", "all"] = "rank"
    """Where ITM draws its hard negatives: from a process's own pairs (BLIP's pretraining), or from those of all
    processes (its fine-tuning on COCO)."""
    negatives_by: Literal["momentum", "online"] = "momentum"
    """What tells how hard a negative is: online features against momentum features (BLIP's pretraining), or against
    online features (its retrieval fine-tuning)."""
    negatives_epsilon: float = added(EPSILON, ge=0, lt=1)
    """Added to each pair's probability of being drawn as a hard negative: 1e-4 in BLIP's pretraining, 0 in its
    retrieval fine-tuning."""
    momentum_from: Literal["model", "start"] = "model"
    """What the momentum copy and the queues begin with: the model and noise, or what the training that the model
    starts from ended with (BLIP's retrieval fine-tuning); that training must have kept them (`keep_momentum`)."""
    mean_over: Literal["rank", "all"] = "rank"
    """Of what LM and ITM are the mean: of a process's own tokens and pairs, and then over processes (BLIP's code), or
    of those of all processes, which does not depend on how many there are."""
    smoothing: float = Field(default=SMOOTHING, ge=0, lt=1)
    """Label smoothing of LM, and of the ITC of BLIP-2."""

    @property
    def has_momentum(self) -> bool:
        """ITC has one; BLIP-2's ITC, which has none, refuses whatever is said of it."""
        return "itc" in self.losses

    def check_batch(self, rows: int) -> None:
        """Refuse a queue that global batches of so many pairs do not fill evenly; ValueError."""
        if "itc" in self.losses and self.queue % rows:
            near = self.queue - self.queue % rows
            raise ValueError(f"objectives.queue {self.queue} is not a multiple of loader.batch_size {rows}; {near} is")
