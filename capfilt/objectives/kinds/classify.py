"""What classifiers are trained for, as recipes know it: visual entailment."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from capfilt.data.loading.config import RowKind
from capfilt.data.tasks import ENTAILMENT_LABELS
from capfilt.models.heads.config import ClassifierConfig
from capfilt.objectives.kinds import TaskConfig, TaskKind
from capfilt.objectives.kinds.downstream import not_in_table

if TYPE_CHECKING:
    from capfilt.models.heads.classifier import Classifier
    from capfilt.objectives.interface import Task

NEEDS = {"answer": frozenset({"encode_image", "classify"})}
"""The capabilities that the loss asks of a model."""


class ClassifyObjectives(TaskConfig):
    """What the trainings of classifiers have alike."""

    rows: ClassVar[RowKind]

    losses: dict[Literal["answer"], float] = Field(default={"answer": 1.0}, min_length=1)
    """The weight of the loss."""

    @property
    def row_kind(self) -> RowKind:
        """What of a sample a row of the training is."""
        return self.rows


class EntailmentObjectives(ClassifyObjectives):
    """Visual entailment: what the picture says of a hypothesis, by cross-entropy over three classes (SNLI-VE, arXiv
    1901.06706; ALBEF section 5)."""

    rows = "hypotheses"

    task: Literal["entailment"] = "entailment"
    """The task's name."""


def build(model: Classifier, config: ClassifyObjectives, prompt: int = 0) -> Task:
    """What trains a classifier."""
    from capfilt.objectives.tasks.classify import Classification

    return Classification(model, config, prompt)


def unsupported(architecture: ClassifierConfig, config: ClassifyObjectives, micro_batches: int) -> str:
    """What does not go together, as a sentence; "" for nothing."""
    if said := not_in_table(config.name(), architecture.base.family):
        return said
    if "fuse" not in architecture.base.capabilities:
        return "its base has no parts that fuse texts with images: give model.base those of a filter."
    if micro_batches > 1:
        return f"micro_batches is {micro_batches}, and batches of this task are not cut: set it to 1."
    return ""


def entailment_of(architecture: ClassifierConfig, config: EntailmentObjectives, micro_batches: int) -> str:
    """As `unsupported`; classes by other names would be learned from no row."""
    if set(architecture.labels) != set(ENTAILMENT_LABELS):
        return f"entailment has the classes {', '.join(ENTAILMENT_LABELS)}: set model.labels to these."
    return unsupported(architecture, config, micro_batches)


ENTAILMENT = TaskKind(EntailmentObjectives, build, NEEDS, entailment_of)
