"""Who looks and speaks: single-device, plain torch.

A family is one file, one line in each table here, and its YAML shelf.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from capfilt import config as configs
from capfilt import presets
from capfilt.errors import RecipeError, did_you_mean
from capfilt.models.blip.model import Blip, BlipConfig
from capfilt.models.blip.model import verbs as blip_verbs
from capfilt.models.blip2.model import Blip2, Blip2Config
from capfilt.models.blip2.model import verbs as blip2_verbs
from capfilt.models.limits import refuse_too_large

Architecture = Annotated[BlipConfig | Blip2Config, Field(discriminator="family")]
"""The architecture of a model of any family."""
Model = Blip | Blip2
"""A model of any family."""

FAMILIES: dict[str, type[BlipConfig] | type[Blip2Config]] = {"blip": BlipConfig, "blip2": Blip2Config}
"""The architecture config of each family, by the name that a YAML gives in `family:`."""

MODELS: dict[str, Callable[[Any], Model]] = {"blip": Blip, "blip2": Blip2}
"""What builds a model from its architecture."""

VERBS: dict[str, Callable[[Any], frozenset[str]]] = {"blip": blip_verbs, "blip2": blip2_verbs}
"""What a model of an architecture can be asked to do."""


def verbs(config: BlipConfig | Blip2Config) -> frozenset[str]:
    """What a model of this architecture can be asked to do; known before anything is built."""
    return VERBS[config.family](config)


def build(config: BlipConfig | Blip2Config) -> Model:
    """A model with fresh weights. ModelError for one that this machine has no memory for."""
    if torch.get_default_device().type != "meta":
        refuse_too_large(config.vision.weights + config.text.weights)
    return MODELS[config.family](config)


def read_architecture(path: Path, sets: Sequence[str] = ()) -> BlipConfig | Blip2Config:
    """The architecture that a YAML describes; one that names no family is of the first there was.

    Raises:
        RecipeError: a family that is not there, or what `config.read` raises.
    """
    tree = configs.load(path)
    parent = tree.get("extends")
    if "family" not in tree and isinstance(parent, str):
        relative = parent.endswith((".yaml", ".yml"))
        tree = configs.load(path.parent / parent if relative else presets.find("models", parent))
    family = str(tree.get("family", "blip"))
    if family not in FAMILIES:
        raise RecipeError(
            f"{path}: there is no family {family!r}.{did_you_mean(family, FAMILIES)} There are: {', '.join(FAMILIES)}."
        )
    return configs.read(path, FAMILIES[family], sets)


__all__ = [
    "FAMILIES",
    "MODELS",
    "Architecture",
    "Blip",
    "Blip2",
    "Blip2Config",
    "BlipConfig",
    "Model",
    "build",
    "read_architecture",
    "verbs",
]
