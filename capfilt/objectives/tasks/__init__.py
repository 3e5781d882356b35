"""What models are trained for: a line a family. Everything that is known of a family's losses is in its own file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import BeforeValidator, SerializeAsAny

from capfilt.config import OpenSection
from capfilt.models.architecture import ArchitectureConfig
from capfilt.objectives.kinds import TaskConfig, TaskKind
from capfilt.objectives.kinds.albef import ALBEF
from capfilt.objectives.kinds.blip import BLIP
from capfilt.objectives.kinds.blip2 import BLIP2
from capfilt.objectives.kinds.classify import ASSIGN, ENTAILMENT, NLVR2, VQA_CLASSES
from capfilt.objectives.kinds.clip import CLIP
from capfilt.objectives.kinds.downstream import DIALOG, FAMILIES_OF, GROUNDING, VQA, not_in_table
from capfilt.objectives.kinds.vilt import VILT, VILT_RETRIEVAL
from capfilt.objectives.kinds.vlmo import VLMO, VLMO_TEXTS
from capfilt.objectives.kinds.xvlm import XVLM

if TYPE_CHECKING:
    from capfilt.models.interface import Model
    from capfilt.objectives.interface import Task

PRETRAINING: dict[str, TaskKind] = {
    "blip": BLIP,
    "blip2": BLIP2,
    "albef": ALBEF,
    "clip": CLIP,
    "vilt": VILT,
    "vlmo": VLMO,
    "xvlm": XVLM,
}
"""How the models of each family are pretrained, and fine-tuned for the roles of captioner and filter."""
FURTHER: dict[str, tuple[TaskKind, ...]] = {
    "blip": (VQA, DIALOG),
    "albef": (DIALOG,),
    "vilt": (VILT_RETRIEVAL, DIALOG),
    "vlmo": (VLMO_TEXTS, DIALOG),
    "xvlm": (DIALOG, GROUNDING),
    "classifier": (ENTAILMENT, NLVR2, VQA_CLASSES, ASSIGN),
    "answerer": (VQA,),
}
"""What else the models of a family can be trained for. Each has a config of its own class, by which it is chosen."""


def tasks_of(family: str) -> tuple[TaskKind, ...]:
    """What the models of a family can be trained for, the pretraining first where they have one."""
    pretraining = (PRETRAINING[family],) if family in PRETRAINING else ()
    return (*pretraining, *FURTHER.get(family, ()))


def task_configs() -> dict[str, type[TaskConfig]]:
    """The config of every task by what the key `task` says; "" is what a section without the key means."""
    families = dict.fromkeys((*PRETRAINING, *FURTHER))
    return {kind.config.name(): kind.config for family in families for kind in tasks_of(family)}


def build_task(model: Model, config: TaskConfig, prompt: int = 0) -> Task:
    """What trains a model; `prompt` is how many tokens each text begins with that are not learned."""
    kinds = [kind for kind in tasks_of(model.config.family) if isinstance(config, kind.config)]
    assert kinds, "a recipe whose objectives are of another family is refused when it is read"
    return kinds[0].build(model, config, prompt)


def unsupported(architecture: ArchitectureConfig, config: TaskConfig, micro_batches: int = 1) -> str:
    """Why a model of this architecture cannot be trained so, as a sentence with what to do; "" where it can."""
    kinds = tasks_of(architecture.family)
    kind = next((kind for kind in kinds if isinstance(config, kind.config)), None)
    if kind is None:
        if said := not_in_table(config.name(), architecture.family):
            return said
        if config.name().removesuffix("-classes") in FAMILIES_OF:
            return (
                f"{config.name()} needs a head, and {architecture.family} alone has none: set model to one with a head "
                f"on it, as in model={{family: classifier, base: {architecture.family}/tiny}} (docs/tasks.md)."
            )
        names = [kind.config.name() for kind in kinds]
        advice = " or ".join(f"set objectives.task={name}" if name else "leave objectives.task out" for name in names)
        return f"its objectives are not those with which the family {architecture.family} is trained: {advice}."
    for name in config.losses:
        if missing := kind.needs[name] - architecture.capabilities:
            possible = [loss for loss, needs in kind.needs.items() if needs <= architecture.capabilities]
            return (
                f"objective '{name}' needs a model that can {', '.join(sorted(missing))}, and this one cannot."
                f" Objectives that it can be trained with: {', '.join(possible) or 'none; give another model'}."
            )
    return kind.unsupported(architecture, config, micro_batches)


def unsaid(architecture: ArchitectureConfig, config: TaskConfig) -> str:
    """A key that a recipe for this architecture should give, because its default is another training's; "" for none."""
    kinds = [kind for kind in tasks_of(architecture.family) if isinstance(config, kind.config)]
    return kinds[0].unsaid(architecture, config) if kinds else ""


ObjectivesSection = Annotated[SerializeAsAny[TaskConfig], BeforeValidator(OpenSection("task", task_configs, ""))]
"""The type of a config field that holds what any task minimises."""
