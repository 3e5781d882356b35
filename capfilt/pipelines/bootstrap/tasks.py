"""Downstream tasks in a bootstrap: after each round its model is fine-tuned for each task and measured.

Every round is fine-tuned with the same seed, on the same texts in the same order, so that what differs between two
rounds is the model alone. Tasks are no part of the run's plan: a finished run may be given some, and only they are
done. What they made is known by its own fingerprints, as that of every stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from capfilt.data import shards
from capfilt.data.loading.config import Source
from capfilt.data.synthetic import world
from capfilt.errors import RecipeError, did_you_mean
from capfilt.evaluation.tasks import TASKS
from capfilt.models import Architecture, architecture_of, label
from capfilt.models.heads.config import HeadConfig
from capfilt.objectives.kinds.downstream import not_in_table
from capfilt.pipelines.bootstrap.config import BootstrapConfig, TaskConfig, TaskTraining
from capfilt.pipelines.bootstrap.context import BootstrapContext, Task
from capfilt.stages.compute import ComputeRequest
from capfilt.stages.count_pairs import with_known_answers
from capfilt.stages.evaluate import EvaluateJob
from capfilt.stages.evaluate import evaluate as run_evaluate
from capfilt.stages.train import check_shape, check_training
from capfilt.storage import documents
from capfilt.storage.paths import StoragePath
from capfilt.training.job import TrainJob

_PAIRS = {"train": "human", "test": "test"}
WORLD_SPLITS: Mapping[str, Mapping[str, str]] = {
    **{task: {split.rpartition("-")[2]: split for split in splits} for task, splits in world.TASKS.items()},
    "retrieval": _PAIRS,
    "captioning": _PAIRS,
}
"""What of the embedded world a task trains on ("train") and is measured on ("test")."""


def check_tasks(config: BootstrapConfig, architecture: Architecture) -> tuple[Task, ...]:
    """The tasks of a recipe, after checking that the model of a round can do them.

    Raises:
        RecipeError: one that is not there or comes twice, that the model cannot do, or that lacks data.
    """
    if config.evaluate.tasks and config.final:
        raise RecipeError(
            "evaluate.tasks compares models of one architecture, and `final` pretrains another: leave one out."
        )
    tasks: list[Task] = []
    for number, section in enumerate(config.evaluate.tasks):
        where = f"evaluate.tasks.{number} ({section.task})"
        if section.task in (task.name for task in tasks):
            raise RecipeError(f"{where}: the task comes twice.")
        tasks.append(_check(config, section, architecture, where))
    return tuple(tasks)


def _check(config: BootstrapConfig, section: TaskConfig, architecture: Architecture, where: str) -> Task:
    if section.task not in TASKS:
        hint = did_you_mean(section.task, TASKS)
        raise RecipeError(f"{where}: there is no such task; there are {', '.join(TASKS)}.{hint}")
    task = TASKS[section.task]
    if config.data.world is None or section.task not in WORLD_SPLITS:
        needed = {"test": section.test} | ({"train": section.train} if section.finetune else {})
        if missing := [name for name, spec in needed.items() if spec is None]:
            raise RecipeError(f"{where}: there are no shards for it: give `{missing[0]}`, shards of docs/tasks.md.")
    if section.finetune is None:
        if not task.can(architecture):
            raise RecipeError(
                f"{where}: {label(config.model)} cannot do it as it is: that needs {task.needs}. Say with `finetune`"
                " how it is trained, a preset of pipelines/finetune/."
            )
        return Task(section, task(task=section.task), None)
    if said := not_in_table(section.task, architecture.family):
        hint = f" As it is, it can: {{task: {section.task}}}." if task.can(architecture) else ""
        raise RecipeError(f"{where}: {said}{hint}")
    trained = _trained(config, section.finetune, architecture, where)
    check_training(trained, section.finetune.train, config.cluster.finetune, where)
    if not task.can(trained):
        raise RecipeError(f"{where}: what `finetune` trains cannot do it: that needs {task.needs}.")
    return Task(section, task(task=section.task), trained)


def _trained(config: BootstrapConfig, finetune: TaskTraining, base: Architecture, where: str) -> Architecture:
    """What a fine-tuning trains: a head on the model of the rounds, or a model of its family and shape."""
    architecture = architecture_of(finetune.model, finetune.train.image_size)
    if isinstance(architecture, HeadConfig):
        sized = base.changed(image_size=architecture.image_size)
        return type(architecture).model_validate(architecture.model_dump(mode="json") | {"base": sized})
    here = f"{where}: {label(finetune.model)}"
    if architecture.family != base.family:
        raise RecipeError(f"{here} is of the family {architecture.family}, and `model` of {base.family}.")
    check_shape(base, architecture, label(config.model), here, ("vision", "text"))
    return architecture


def world_splits(config: BootstrapConfig) -> list[str]:
    """The splits of the embedded world that only tasks need."""
    if config.data.world is None:
        return []
    needed = (split for task in config.evaluate.tasks for split in _splits(task).values())
    return [split for split in dict.fromkeys(needed) if split not in world.SPLITS]


def _splits(task: TaskConfig) -> dict[str, str]:
    """The splits of the embedded world for what of a task has no shards of its own, by part: train, test."""
    return {
        part: split
        for part, split in WORLD_SPLITS.get(task.task, {}).items()
        if getattr(task, part) is None and (part == "test" or task.finetune)
    }


def check_files(config: BootstrapConfig) -> None:
    """Refuse shards of tasks that are not there. ShardError."""
    for task in config.evaluate.tasks:
        for part in ("train", "test"):
            if (spec := getattr(task, part)) is not None:
                shards.expand(spec)


def compute_requests(config: BootstrapConfig) -> dict[str, ComputeRequest]:
    """What the fine-tunings request to compute with; all are measured as the rounds' models are."""
    return {
        f"task-{task.task}": ComputeRequest(task.finetune.train.precision, config.cluster.finetune, training=True)
        for task in config.evaluate.tasks
        if task.finetune is not None
    }


def measure(context: BootstrapContext, r: int, models: Mapping[str, StoragePath]) -> dict[str, Any]:
    """The figures of the model that a round pretrained, by task; {} where the recipe names none."""
    figures = {task.name: _measure(context, r, task, models["pretrain"]) for task in context.opened.tasks}
    return {"tasks": figures} if figures else {}


def _measure(context: BootstrapContext, r: int, task: Task, model: StoragePath) -> dict[str, Any]:
    home, test = context.folder(r, task.stage), _shards(context, task, "test")
    if task.architecture is not None:
        model = _finetune(context, r, task, model)
    job = EvaluateJob(
        out=home,
        models={"metrics": model},
        shards=test,
        contents=context.contents(r, test),
        config=task.evaluation.with_data(test),
        compute=context.compute["evaluate"],
    )
    run_evaluate(context.session, job, context.config.cluster.annotate, context.progress, f"round {r} {task.name}")
    measured = documents.read_object(home / "metrics.json")
    return {**measured.pop(task.name), **measured}


def _finetune(context: BootstrapContext, r: int, task: Task, model: StoragePath) -> StoragePath:
    assert task.config.finetune is not None
    assert task.architecture is not None
    train, urls = task.config.finetune.train, _shards(context, task, "train")
    job = TrainJob(
        out=context.folder(r, task.stage, "finetune"),
        architecture=with_known_answers(task.architecture, train.objectives, urls),
        start=model,
        tokenizer=context.config.tokenizer,
        sources=(Source(shards=urls),),
        train=train,
        compute=context.compute[task.stage],
        seed=context.seed(0, task.stage),
    )
    return context.train(r, job, context.config.cluster.finetune, f"{task.name} finetune")


def _shards(context: BootstrapContext, task: Task, part: str) -> tuple[str, ...]:
    """The shards that a task trains on or is measured on."""
    given = getattr(task.config, part)
    return tuple(context.splits[_splits(task.config)[part]] if given is None else shards.expand(given))
