"""ViLT's pretraining and fine-tuning, as recipes know them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from capfilt.objectives.kinds import TaskConfig, TaskKind, built_by, needs_of

if TYPE_CHECKING:
    from capfilt.models.vilt.config import ViltConfig

Objective = Literal["mlm", "itm", "wpa"]


class ViltObjectives(TaskConfig):
    """Which losses are summed, and their constants; the defaults are those of ViLT's pretraining."""

    match_share = 1 / 2

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


class ViltRetrievalObjectives(TaskConfig):
    """Fine-tuning for retrieval: an image's text among wrong ones (ViLT section 4.3)."""

    task: Literal["vilt-retrieval"] = "vilt-retrieval"
    """The task's name."""
    losses: dict[Literal["rank"], float] = Field(default={"rank": 1.0}, min_length=1)
    """The weight of the loss."""
    wrong_texts: int = Field(default=15, ge=1, le=1000)
    """Texts of other images beside which each image is read, of those of the global batch; each costs a pass."""


def without_rank(architecture: ViltConfig, config: TaskConfig, micro_batches: int) -> str:
    """Why a model cannot be trained to rank, as a sentence with what to do; ""."""
    if "rank" not in architecture.heads:
        have = ", ".join(architecture.heads) or "none"
        return f"objective 'rank' needs the head rank, and its heads are {have}: set model.heads=[rank]."
    return ""


RANKS = {"rank": frozenset({"encode_image"})}
VILT = TaskKind(ViltObjectives, built_by("vilt.ViltPretraining"), needs_of("mlm", "itm", "wpa"))
VILT_RETRIEVAL = TaskKind(ViltRetrievalObjectives, built_by("vilt.ViltRetrieval"), RANKS, without_rank)
