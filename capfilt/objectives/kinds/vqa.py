"""VQA by a decoder of answers, as recipes know it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from capfilt.models.architecture import ArchitectureConfig
from capfilt.models.heads.config import AnswererConfig
from capfilt.objectives.kinds import TaskConfig, TaskKind, built_by, not_cut

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
