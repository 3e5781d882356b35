"""X-VLM's pretraining and fine-tuning for filtering and captioning, as recipes know them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from capfilt.data.loading.config import RegionConfig
from capfilt.models.xvlm.config import XvlmConfig
from capfilt.objectives.kinds import TaskConfig, TaskKind, built_by, needs_of, not_cut

XvlmObjective = Literal["itc", "itm", "mlm", "box", "giou", "lm"]
BOXES = frozenset({"box", "giou"})


class XvlmObjectives(TaskConfig):
    """Which losses are summed, and their constants; the defaults are the paper's for pairs (X-VLM section 3.2)."""

    task: Literal["xvlm"] = "xvlm"
    """The task's name."""
    losses: dict[XvlmObjective, float] = Field(default={"itc": 1.0, "itm": 1.0, "mlm": 1.0}, min_length=1)
    """Weight of each; X-VLM sums them unweighted, with `box` (L1) and `giou` of regions. A captioner has `lm` alone."""
    regions: RegionConfig | None = None
    """The steps on regions; null: pairs alone."""
    epsilon: float = Field(default=1e-5, ge=0)
    """What is added to the likelihood of every hard negative."""
    itc_gradients: Literal["rank", "all"] = "rank"
    """Whether features have the gradients of their own process alone, as released, which is 1 / processes of the
    gradient of ITC; or of all."""
    itc_targets: Literal["pair", "image"] = "pair"
    """What a row of ITC asks for, and what ITM does not take for wrong: the pair alone, or all that is of its image, as
    in X-VLM's fine-tuning for retrieval."""
    mask_rate: float = Field(default=0.25, gt=0, lt=1)
    """Share of the tokens that MLM hides."""
    max_masks: int = Field(default=8, ge=1)
    """Tokens of a text that MLM hides at most; 6 in X-VLM's larger pretraining."""
    ngrams: float = Field(default=0.2, ge=0, le=1)
    """How often two or three pieces are hidden at once, and not a word."""
    smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Label smoothing of `lm`, as X-VLM's own code does it: its targets sum to less than 1."""
    mean_over: Literal["rank", "all"] = "rank"
    """Of what losses are the mean: of a process's own tokens, pairs and boxes, and then over processes, as released; or
    of those of all processes."""

    @property
    def region_steps(self) -> RegionConfig | None:
        return self.regions


def unsupported(architecture: XvlmConfig, config: XvlmObjectives, micro_batches: int) -> str:
    """What does not go together, as a sentence; "" for nothing."""
    if said := not_cut(architecture, config, micro_batches, "X-VLM's batches"):
        return said
    boxes = BOXES & config.losses.keys()
    if boxes and config.regions is None:
        return (
            f"objective '{min(boxes)}' is of regions, and there are no steps on regions: give objectives.regions "
            "(share, images, texts), or leave it out."
        )
    if config.regions is not None and "ground" not in architecture.capabilities:
        return (
            "steps on regions are of a pretraining, and this model has no head for boxes: set objectives.regions=null."
        )
    return ""


NEEDS = needs_of("itc", "itm", "mlm", "box", "giou", "lm")
XVLM = TaskKind(XvlmObjectives, built_by("xvlm.XvlmPretraining"), NEEDS, unsupported)
