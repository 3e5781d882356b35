"""What models can be evaluated for: a line a task. All else that is known of a task is where its `code` is.

Read before torch is imported, so that a model which cannot do a task is refused before any weight is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from capfilt.data.loading.task_texts import TRUE_FALSE
from capfilt.data.tasks import ENTAILMENT_LABELS
from capfilt.errors import RecipeError, UsageError, did_you_mean
from capfilt.evaluation.tasks.config import (
    CaptioningEvalConfig,
    ClassificationEvalConfig,
    DialogEvalConfig,
    EntailmentEvalConfig,
    GroundingEvalConfig,
    Nlvr2EvalConfig,
    RetrievalEvalConfig,
    TaskEvalConfig,
    VqaEvalConfig,
)
from capfilt.inference.roles import lacking, preprocess_for, tokenizer_for
from capfilt.models.checkpoints import store

if TYPE_CHECKING:
    import torch

    from capfilt.inference.local_model import LocalModel
    from capfilt.models.architecture import ArchitectureConfig
    from capfilt.storage.paths import StoragePath


@dataclass(frozen=True)
class Measured:
    """What an evaluation gives."""

    figures: Mapping[str, Any]
    write_answers: Callable[[StoragePath], object] | None = None
    """Writes the result file that the task's server takes; None for a task without one."""


class Measure(Protocol):
    """Evaluates a model: the function that a task names as its `code`. DataError where nothing can be measured."""

    def __call__(
        self, local: LocalModel, urls: Sequence[str], config: Any, device: torch.device
    ) -> Measured: ...  # fmt: skip


@dataclass(frozen=True)
class EvaluationTask:
    """A task, as it is known before torch is imported."""

    config: type[TaskEvalConfig]
    can: Callable[[ArchitectureConfig], bool]
    """Whether a model of this architecture can do it."""
    needs: str
    """What of a model the task needs, and which models have that, as the end of a sentence."""
    code: str
    """The function that measures it: MODULE.FUNCTION of this package."""
    has_answers: bool = False
    """Whether there is a result file for the task's server."""

    @property
    def name(self) -> str:
        """What --task says."""
        return str(self.config.model_fields["task"].default)

    @property
    def measure(self) -> Measure:
        """The code, imported now."""
        module, _, function = self.code.partition(".")
        measure: Measure = getattr(import_module(f"{__name__}.{module}"), function)
        return measure


def _can(*capabilities: str) -> Callable[[ArchitectureConfig], bool]:
    needed = frozenset(capabilities)
    return lambda architecture: needed <= architecture.capabilities


def _classifies(pictures: int, labels: frozenset[str]) -> Callable[[ArchitectureConfig], bool]:
    """Whether a model has just these classes, for texts beside so many pictures."""

    def can(architecture: ArchitectureConfig) -> bool:
        classifies = "classify" in architecture.capabilities and architecture.pictures_of_text == pictures
        return classifies and set(architecture.known_answers or ()) == labels

    return can


_ENTAILS = _classifies(1, frozenset(ENTAILMENT_LABELS))


def _answers(architecture: ArchitectureConfig) -> bool:
    """Whether a model answers questions; a classifier's classes are taken for answers unless they are entailment's."""
    classifies = "classify" in architecture.capabilities and architecture.pictures_of_text == 1
    return "answer" in architecture.capabilities or (classifies and not _ENTAILS(architecture))


_TASKS = (
    EvaluationTask(
        RetrievalEvalConfig,
        lambda architecture: not lacking("filter", architecture.capabilities),
        "a filter: a model that encodes texts, or fuses them with images",
        "pairs.measure_retrieval",
    ),
    EvaluationTask(
        CaptioningEvalConfig,
        lambda architecture: not lacking("captioner", architecture.capabilities),
        "a captioner: a model that decodes (blip, blip2, xvlm)",
        "pairs.measure_captioning",
    ),
    EvaluationTask(
        ClassificationEvalConfig,
        _can("encode_image", "encode_text"),
        "a cosine between images and texts (clip, blip, albef, xvlm, vlmo, blip2's first stage)",
        "classification.measure",
    ),
    EvaluationTask(
        GroundingEvalConfig,
        lambda architecture: "ground" in architecture.capabilities or bool(architecture.fusion_layers),
        "a head for boxes (xvlm), or layers in which a text attends to a grid of patches (blip, albef, xvlm)",
        "grounding.measure",
    ),
    EvaluationTask(
        DialogEvalConfig,
        DialogEvalConfig.can,
        "a head that matches texts with images (blip, albef, vilt, vlmo, xvlm), or a decoder (blip, xvlm)",
        "dialog.measure",
        has_answers=True,
    ),
    EvaluationTask(
        VqaEvalConfig,
        _answers,
        "a model that answers questions (capfilt finetune vqa-tiny ...: blip, albef, vilt, vlmo, xvlm)",
        "answering.measure_vqa",
        has_answers=True,
    ),
    EvaluationTask(
        Nlvr2EvalConfig,
        _classifies(2, frozenset(TRUE_FALSE.values())),
        "a classifier of two pictures with the classes true and false (capfilt finetune nlvr2-tiny ...: blip, albef, "
        "vilt, vlmo, xvlm)",
        "answering.measure_nlvr2",
    ),
    EvaluationTask(
        EntailmentEvalConfig,
        _ENTAILS,
        f"a classifier with the classes {', '.join(ENTAILMENT_LABELS)} (capfilt finetune entailment-tiny ...: blip, "
        "albef, vilt, vlmo, xvlm)",
        "answering.measure_entailment",
    ),
)

TASKS: dict[str, EvaluationTask] = {task.name: task for task in _TASKS}
"""Every task by what --task says."""


def task_of(name: str) -> EvaluationTask:
    """The task of this name. UsageError for a name that none has."""
    if name not in TASKS:
        raise UsageError(
            f"--task {name}: there is no such task; there are {', '.join(TASKS)}.{did_you_mean(name, TASKS)}"
        )
    return TASKS[name]


def check_task(model: StoragePath, config: TaskEvalConfig) -> None:
    """Refuse a saved model that cannot do a task.

    Raises:
        RecipeError: the architecture lacks what the task needs.
        CapfiltError: its pictures or its tokenizer cannot be prepared.
    """
    architecture = store.architecture(model)
    task = TASKS[config.task]
    if not task.can(architecture):
        able = ", ".join(sorted(architecture.capabilities))
        raise RecipeError(
            f"{model} cannot be evaluated for {task.name}: that needs {task.needs}."
            f" This is a model of the family {architecture.family} that can {able}."
        )
    config.check_architecture(model, architecture)
    preprocess_for(model, architecture)
    tokenizer_for(model, architecture)
