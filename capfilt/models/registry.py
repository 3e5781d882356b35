"""The model families: one line each. Everything that is known of a family is in its own folder.

`Architecture` is the type of a config field that holds an architecture of any family.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BeforeValidator, SerializeAsAny

from capfilt import config as configs
from capfilt import presets
from capfilt.config import OpenSection
from capfilt.data.images.preprocess import CLIP_PREPROCESS, VILT_PREPROCESS, Preprocess
from capfilt.errors import RecipeError, did_you_mean
from capfilt.models.albef.config import AlbefConfig
from capfilt.models.architecture import ArchitectureConfig
from capfilt.models.blip.config import BlipConfig
from capfilt.models.blip2.config import Blip2Config
from capfilt.models.clip.config import ClipConfig
from capfilt.models.family import Family, code_in
from capfilt.models.heads import ANSWERER, CLASSIFIER
from capfilt.models.layers.limits import refuse_too_large
from capfilt.models.vilt.config import ViltConfig
from capfilt.models.vlmo.config import VlmoConfig
from capfilt.models.xvlm.config import XvlmConfig
from capfilt.recipe_tree import read_tree

if TYPE_CHECKING:
    from capfilt.models.interface import Model

HALF = (0.5, 0.5, 0.5)
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("blip", BlipConfig, code_in("blip.checkpoint")),
        Family("blip2", Blip2Config, code_in("blip2.checkpoint")),
        Family("albef", AlbefConfig, code_in("albef.checkpoint"), written_as="pth"),
        Family("clip", ClipConfig, code_in("clip.checkpoint"), CLIP_PREPROCESS),
        Family("vilt", ViltConfig, code_in("vilt.checkpoint"), VILT_PREPROCESS),
        Family("vlmo", VlmoConfig, code_in("vlmo.checkpoint"), Preprocess(mean=HALF, std=HALF), "pth"),
        Family("xvlm", XvlmConfig, code_in("xvlm.checkpoint"), written_as="pth"),
        CLASSIFIER,
        ANSWERER,
    )
}
"""Every family by the name that a YAML gives in `family:`; the first is what a YAML means that gives none."""


def family_of(config: ArchitectureConfig) -> Family:
    """The family of an architecture."""
    return FAMILIES[config.family]


def preprocess_of(config: ArchitectureConfig) -> Preprocess:
    """How pictures are wanted by a model of this architecture whose folder does not say."""
    return config.pictures(family_of(config).preprocess)


def build(config: ArchitectureConfig) -> Model:
    """A model with fresh weights. ModelError for one that this machine has no memory for."""
    import torch

    if torch.get_default_device().type != "meta":
        refuse_too_large(config.num_weights)
    return family_of(config).code.build(config)


def blank(config: ArchitectureConfig) -> Model:
    """A model without weights, on the meta device: its names and shapes."""
    from capfilt.models.checkpoints.fill import without_weights

    with without_weights():
        return build(config)


def read_architecture(path: Path, sets: Sequence[str] = ()) -> ArchitectureConfig:
    """The architecture that a YAML describes.

    Raises:
        RecipeError: a family that is not there, or what `config.read` raises.
    """
    tree = read_tree(path, ArchitectureConfig, sets)
    family = str(tree.get("family", next(iter(FAMILIES))))
    if family not in FAMILIES:
        raise RecipeError(
            f"{path}: there is no family {family!r}.{did_you_mean(family, FAMILIES)} There are: {', '.join(FAMILIES)}."
        )
    return configs.validate(FAMILIES[family].config, tree, path, sets)


_SECTION = OpenSection(
    "family",
    lambda: {name: family.config for name, family in FAMILIES.items()},
    next(iter(FAMILIES)),
    base=ArchitectureConfig,
)

Architecture = Annotated[SerializeAsAny[ArchitectureConfig], BeforeValidator(_SECTION)]
"""The architecture of a model of any family."""

ModelSection = Annotated[str | SerializeAsAny[ArchitectureConfig], BeforeValidator(_SECTION)]
"""The key `model` of a recipe: a preset of `models/`, a YAML, or an architecture, which may extend one of them."""


def architecture_of(model: str | ArchitectureConfig, image_size: int | None = None) -> ArchitectureConfig:
    """The architecture of a recipe's model, with another picture size if one is given.

    Raises:
        RecipeError: a preset that is not there, or a picture size that does not fit.
    """
    where = presets.find("models", model) if isinstance(model, str) else "model"
    architecture = model if isinstance(model, ArchitectureConfig) else read_architecture(Path(where))
    if image_size is None:
        return architecture
    return configs.changed(architecture, [f"{architecture.image_size_key}={image_size}"], where)


def label(model: str | ArchitectureConfig) -> str:
    """The name of a recipe's model for messages and results: as it is written, or the family of an architecture."""
    return model if isinstance(model, str) else model.family
