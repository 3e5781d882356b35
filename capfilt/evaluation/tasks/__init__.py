"""What models can be evaluated for: a line a task. All else that is known of a task is in its config.

Read before torch is imported, so that a model which cannot do a task is refused before any weight is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from capfilt.errors import RecipeError, UsageError, did_you_mean
from capfilt.evaluation.tasks import config as task_configs
from capfilt.evaluation.tasks.config import TaskEvalConfig
from capfilt.inference.roles import preprocess_for, tokenizer_for
from capfilt.models.checkpoints import store

if TYPE_CHECKING:
    from capfilt.storage.paths import StoragePath


@dataclass(frozen=True)
class Measured:
    """What an evaluation gives."""

    figures: Mapping[str, Any]
    write_answers: Callable[[StoragePath], object] | None = None
    """Writes the result file that the task's server takes; None for a task without one."""


TASKS: dict[str, type[TaskEvalConfig]] = {
    "retrieval": task_configs.RetrievalEvalConfig,
    "captioning": task_configs.CaptioningEvalConfig,
    "classification": task_configs.ClassificationEvalConfig,
    "grounding": task_configs.GroundingEvalConfig,
    "dialog": task_configs.DialogEvalConfig,
    "vqa": task_configs.VqaEvalConfig,
    "nlvr2": task_configs.Nlvr2EvalConfig,
    "entailment": task_configs.EntailmentEvalConfig,
}
"""Every task by what --task says."""


def task_of(name: str) -> type[TaskEvalConfig]:
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
    if not config.can(architecture):
        able = ", ".join(sorted(architecture.capabilities))
        raise RecipeError(
            f"{model} cannot be evaluated for {config.task}: that needs {config.needs}."
            f" This is a model of the family {architecture.family} that can {able}."
        )
    config.check_architecture(model, architecture)
    preprocess_for(model, architecture)
    tokenizer_for(model, architecture)
