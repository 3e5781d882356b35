"""What is known of every training task before torch is imported: its frozen config, and what it asks of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from capfilt.config import Config

if TYPE_CHECKING:
    from torch import Tensor

    from capfilt.data.loading.config import RegionConfig, RowKind
    from capfilt.models.architecture import ArchitectureConfig
    from capfilt.objectives.interface import Task

_NEEDS = {
    "itc": frozenset({"encode_image", "encode_text"}),
    "itm": frozenset({"encode_image", "fuse"}),
    "wpa": frozenset({"encode_image", "fuse"}),
    "lm": frozenset({"encode_image", "decode"}),
    "mlm": frozenset({"encode_image", "unmask"}),
    "box": frozenset({"encode_image", "ground"}),
    "giou": frozenset({"encode_image", "ground"}),
}


def needs_of(*losses: str) -> dict[str, frozenset[str]]:
    """The capabilities that each of these losses asks of a model, in every task that has a loss of that name."""
    return {loss: _NEEDS[loss] for loss in losses}


class TaskConfig(Config):
    """What is minimised, and its constants: the section `objectives` of a training. Each task has a class of its own,
    so that a new task adds no key to the plans of others; a section says which by its key `task`."""

    row_kind: ClassVar[RowKind] = "captions"
    """What of a sample a row of the training is: a caption, or something of a downstream task."""
    reads_images: ClassVar[bool] = True
    """Whether pictures are decoded for it; where not, it may be given files of texts."""
    match_share: ClassVar[float] = 1 / 3
    """The share of ITM's pairs that match: a third, where each has a wrong image and a wrong text."""

    losses: Mapping[Any, float]
    """The weight of each loss."""

    @property
    def has_momentum(self) -> bool:
        """Whether a momentum copy of the model is trained along."""
        return False

    @property
    def resumes_momentum(self) -> bool:
        """Whether it begins as the one that the training which the model starts from has kept."""
        return getattr(self, "momentum_from", "model") == "start"

    @property
    def least_answers(self) -> int | None:
        """How often an answer must be given in a training's rows to be one that the model chooses among, where the
        recipe names none; None: it chooses among no answers."""
        return getattr(self, "min_answers", None)

    @property
    def region_steps(self) -> RegionConfig | None:
        """The steps on regions between those on pairs; None: there are none."""
        return None

    def check_batch(self, rows: int) -> None:
        """Refuse a global batch of so many pairs that the task cannot take; ValueError."""

    def weight_of_mean(self, count: Tensor) -> Tensor | float:
        """What a mean over `count` things of this process weighs; 1 where processes count alike, however much they
        have, which a task with a key `mean_over` may leave open."""
        from capfilt.objectives.collectives import share_of_total

        return share_of_total(count) if getattr(self, "mean_over", "rank") == "all" else 1.0

    @classmethod
    def name(cls) -> str:
        """What the key `task` says; "" for the task that a section without the key means."""
        field = cls.model_fields.get("task")
        return "" if field is None else str(field.default)


def built_by(name: str) -> Callable[[Any, Any, int], Task]:
    """What builds a task by its name in `objectives.tasks`, "vqa.Vqa", imported when one is trained."""

    def build(model: Any, config: Any, prompt: int = 0) -> Task:
        module, _, made = name.partition(".")
        return getattr(import_module(f"capfilt.objectives.tasks.{module}"), made)(model, config, prompt)

    return build


def nothing(architecture: ArchitectureConfig, config: TaskConfig, micro_batches: int) -> str:
    """Nothing is unsupported."""
    return ""


def not_cut(
    architecture: ArchitectureConfig, config: TaskConfig, micro_batches: int, batches: str = "batches of this task"
) -> str:
    """Micro batches alone are unsupported."""
    return f"micro_batches is {micro_batches}, and {batches} are not cut: set it to 1." if micro_batches > 1 else ""


def all_said(architecture: ArchitectureConfig, config: TaskConfig) -> str:
    """Every default is as published."""
    return ""


@dataclass(frozen=True)
class TaskKind:
    """How models of a family are trained for a task."""

    config: type[TaskConfig]
    build: Callable[[Any, Any, int], Task]
    """(model, config, how many tokens each text begins with that are not learned) -> the task."""
    needs: Mapping[Any, frozenset[str]]
    """The capabilities that each loss asks of a model."""
    unsupported: Callable[[Any, Any, int], str] = nothing
    """(architecture, config, micro_batches) -> what of them does not go together, as a sentence with what to do; ""."""
    unsaid: Callable[[Any, Any], str] = all_said
    """(architecture, config) -> a key that a recipe should give because its default is another training's, as a
    sentence with what to do; ""."""
