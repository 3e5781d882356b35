"""A model family: what recipes and checks know of it, and the code that is imported when a model is built or read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from capfilt.data.images.preprocess import BLIP_PREPROCESS, Preprocess
from capfilt.models.architecture import ArchitectureConfig

if TYPE_CHECKING:
    from capfilt.models.checkpoints.files import Tensors
    from capfilt.models.interface import FolderFormat, InitialPart, Model, OriginalFormat, TransformersFormat
    from capfilt.models.layers.block import Block


@dataclass(frozen=True)
class FamilyCode:
    """What of a family needs torch: how its models are built, read and written."""

    build: Callable[[Any], Model]
    """An architecture -> a model with fresh weights."""
    blocks: tuple[Block, ...] = ()
    """What FSDP and the compiler treat one by one."""
    continued: Callable[[Any, Any, Tensors, object], Model] | None = None
    """A model that goes on from a saved one: (its architecture, the saved one's, the saved tensors, their source).
    ModelError where more is missing than may start fresh. None: from one of the same shape alone."""
    initial: Mapping[str, InitialPart] = field(default_factory=dict)
    """The parts of a new model ("vision", "text", "language") that can begin with weights of other checkpoints."""
    transformers: TransformersFormat | None = None
    original: OriginalFormat | None = None
    open_clip: FolderFormat | None = None
    ignored: Mapping[str, str] = field(default_factory=dict)
    """Keys of checkpoint files that are left behind on purpose (patterns), and why."""


@dataclass(frozen=True)
class Family:
    """An architecture with everything that belongs to it."""

    name: str
    config: type[ArchitectureConfig]
    load: Callable[[], FamilyCode]
    """Imports the code (`code_in`); called once, by `code`."""
    preprocess: Preprocess = BLIP_PREPROCESS
    """How pictures are wanted where a model's folder does not say."""
    written_as: Literal["hf", "pth", "capfilt"] = "hf"
    """How a model is exported for other code: for transformers, or where it has no such class by the names of the
    family's own code; "capfilt": no other code reads it."""

    @cached_property
    def code(self) -> FamilyCode:
        """How its models are built, read and written; imported with the first use."""
        return self.load()


def code_in(module: str) -> Callable[[], FamilyCode]:
    """What imports the `CODE` of a module of `capfilt.models`, such as "blip.checkpoint"."""

    def load() -> FamilyCode:
        return import_module(f"capfilt.models.{module}").CODE

    return load
