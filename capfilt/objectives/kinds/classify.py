"""What classifiers are trained for, as recipes know it: visual entailment, NLVR2, VQA over a list of answers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from capfilt.data.loading.task_texts import TRUE_FALSE
from capfilt.data.tasks import ENTAILMENT_LABELS
from capfilt.models.heads.config import ClassifierConfig
from capfilt.objectives.kinds import TaskConfig, TaskKind, built_by, not_cut
from capfilt.objectives.kinds.downstream import not_in_table

SIDES = ("left", "right", "neither")
"""The pictures that a text is assigned to."""
ASSIGNING = ("albef", "xvlm", "blip")
"""The families that can be trained so."""
NEEDS = {"answer": frozenset({"encode_image", "classify"})}
"""The capabilities that the loss asks of a model."""


class ClassifyObjectives(TaskConfig):
    """What the trainings of classifiers have alike."""

    losses: dict[Literal["answer"], float] = Field(default={"answer": 1.0}, min_length=1)
    """The weight of the loss."""
    alpha: float = Field(default=0.0, ge=0, le=1)
    """Final weight of a momentum copy's soft targets; 0: there is none. ALBEF's fine-tunings have 0.4."""
    alpha_ramp: float = Field(default=0.0, ge=0, le=1)
    """Share of the training over which alpha grows from 0; ALBEF: the first epoch, and none for entailment."""
    momentum: float = Field(default=0.995, ge=0, le=1)
    """Of its weights, what the momentum copy keeps at each step."""

    @property
    def has_momentum(self) -> bool:
        return self.alpha > 0


class EntailmentObjectives(ClassifyObjectives):
    """Visual entailment: what the picture says of a hypothesis, by cross-entropy over three classes (SNLI-VE, arXiv
    1901.06706; ALBEF section 5)."""

    row_kind = "hypotheses"

    task: Literal["entailment"] = "entailment"
    """The task's name."""


class NlvrObjectives(ClassifyObjectives):
    """Whether a statement about two pictures is true (NLVR2, arXiv 1811.00491), by cross-entropy."""

    row_kind = "statements"

    task: Literal["nlvr2"] = "nlvr2"
    """The task's name."""


class VqaClassesObjectives(ClassifyObjectives):
    """Answers to questions as classes, of which several may be right: binary cross-entropy, summed over the classes,
    with targets by how many people gave an answer (ViLT section 4.3; VLMo)."""

    row_kind = "questions"

    task: Literal["vqa-classes"] = "vqa-classes"
    """The task's name."""
    min_answers: int = Field(default=9, ge=1)
    """Where the model has no labels: of how many questions an answer must be the most common one to be a class,
    normalised as VQAv2 does; 9 leaves 3,129 of VQAv2's train and val."""


class AssignObjectives(ClassifyObjectives):
    """Which of two pictures a text is of, or neither: ALBEF's training between its pretraining and NLVR2 (text
    assignment; ALBEF section 5, X-VLM section 4.2). Rows are captions; the other pictures are those of the batch."""

    task: Literal["assign"] = "assign"
    """The task's name."""


def unsupported(architecture: ClassifierConfig, config: ClassifyObjectives, micro_batches: int) -> str:
    """What does not go together, as a sentence; "" for nothing."""
    if said := not_in_table(config.name().removesuffix("-classes"), architecture.base.family):
        return said
    if architecture.images != (2 if config.row_kind == "statements" else 1):
        return (
            f"{config.name()} is about {'two pictures' if architecture.images == 1 else 'one picture'}: set "
            f"model.images={3 - architecture.images}."
        )
    if "fuse" not in architecture.base.capabilities:
        return "its base has no parts that fuse texts with images: give model.base those of a filter."
    return not_cut(architecture, config, micro_batches)


def entailment_of(architecture: ClassifierConfig, config: EntailmentObjectives, micro_batches: int) -> str:
    """As `unsupported`; classes by other names would be learned from no row."""
    if set(architecture.labels) != set(ENTAILMENT_LABELS):
        return f"entailment has the classes {', '.join(ENTAILMENT_LABELS)}: set model.labels to these."
    return unsupported(architecture, config, micro_batches)


def nlvr2_of(architecture: ClassifierConfig, config: NlvrObjectives, micro_batches: int) -> str:
    """As `entailment_of`."""
    if set(architecture.labels) != set(TRUE_FALSE.values()):
        return "nlvr2 has the classes 'false' and 'true', as texts: set model.labels to these."
    return unsupported(architecture, config, micro_batches)


def assign_of(architecture: ClassifierConfig, config: AssignObjectives, micro_batches: int) -> str:
    """As `entailment_of`."""
    if architecture.labels != SIDES or architecture.images != 2:
        return f"assign has two pictures and the classes {', '.join(SIDES)}: set model.images=2 and these labels."
    if architecture.base.family not in ASSIGNING:
        return f"text assignment is for models that encode a picture alike on both sides: {', '.join(ASSIGNING)}."
    if config.alpha:
        return "text assignment has no momentum copy: set objectives.alpha=0."
    return "micro_batches must be 1: batches of this task are not cut." if micro_batches > 1 else ""


ASSIGN = TaskKind(AssignObjectives, built_by("classify.Assignment"), NEEDS, assign_of)
ENTAILMENT = TaskKind(EntailmentObjectives, built_by("classify.Classification"), NEEDS, entailment_of)
NLVR2 = TaskKind(NlvrObjectives, built_by("classify.Classification"), NEEDS, nlvr2_of)
VQA_CLASSES = TaskKind(VqaClassesObjectives, built_by("classify.Classification"), NEEDS, unsupported)
