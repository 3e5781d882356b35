"""Downstream tasks, as recipes know them: which families can do which, VQA by a decoder of answers, visual dialog, and
where in a picture a phrase is. Those of classifiers are in `classify`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from capfilt.models.architecture import ArchitectureConfig
from capfilt.models.heads.config import AnswererConfig
from capfilt.objectives.kinds import TaskConfig, TaskKind, built_by, needs_of, not_cut

FAMILIES_OF: dict[str, tuple[str, ...]] = {
    "retrieval": ("blip", "blip2", "albef", "clip", "vilt", "vlmo", "xvlm"),
    "captioning": ("blip", "blip2", "xvlm"),
    "vqa": ("blip", "albef", "vilt", "vlmo", "xvlm"),
    "nlvr2": ("blip", "albef", "vilt", "vlmo", "xvlm"),
    "entailment": ("blip", "albef", "vilt", "vlmo", "xvlm"),
    "grounding": ("xvlm",),
    "dialog": ("blip", "albef", "vilt", "vlmo", "xvlm"),
}
"""By the task; a head of a task (`models/heads`) counts by the family of its base."""


def not_in_table(task: str, family: str) -> str:
    """Why a family cannot do a task, as a sentence with those that can; "" where it can, and of any other task."""
    able = FAMILIES_OF.get(task, (family,))
    if family in able:
        return ""
    return f"the family {family} cannot do {task}: {' and '.join(filter(None, (', '.join(able[:-1]), able[-1])))} can."


# ---- VQA ----

BY_DECODER = ("albef", "xvlm")
"""The families whose answers a model of the family `answerer` decodes; BLIP's own architecture does."""


class VqaObjectives(TaskConfig):
    """Answers to questions, written by a decoder beside the fused question: language modelling of each answer that
    people gave, weighted by how many gave it (ALBEF section 5; BLIP section 5.3). The defaults are BLIP's."""

    row_kind = "questions"

    task: Literal["vqa"] = "vqa"
    """The task's name."""
    losses: dict[Literal["answer"], float] = Field(default={"answer": 1.0}, min_length=1)
    """The weight of the loss."""
    smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Label smoothing; ALBEF and X-VLM have none."""
    alpha: float = Field(default=0.0, ge=0, le=1)
    """Final weight of a momentum copy's soft targets; 0: there is none. ALBEF has 0.4."""
    alpha_ramp: float = Field(default=0.125, ge=0, le=1)
    """Share of the training over which alpha grows from 0; ALBEF: the first of 8 epochs."""
    momentum: float = Field(default=0.995, ge=0, le=1)
    """Of its weights, what the momentum copy keeps at each step."""
    min_answers: int = Field(default=9, ge=1)
    """Where the model has no list of answers: of how many questions an answer must be the most common one to be in it,
    normalised as VQAv2 does; all answers are learned."""

    @property
    def has_momentum(self) -> bool:
        return self.alpha > 0


def unsupported(architecture: ArchitectureConfig, config: VqaObjectives, micro_batches: int) -> str:
    """What does not go together, as a sentence; "" for nothing."""
    if isinstance(architecture, AnswererConfig) and architecture.base.family not in BY_DECODER:
        return (
            f"a decoder on a base is for {' and '.join(BY_DECODER)}: of a blip set model.answers=true and "
            f"model.text.share=none, of others take family classifier and objectives.task=vqa-classes."
        )
    return not_cut(architecture, config, micro_batches)


VQA = TaskKind(VqaObjectives, built_by("vqa.Vqa"), {"answer": frozenset({"encode_image", "answer"})}, unsupported)


# ---- visual dialog ----

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


# ---- grounding ----

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
