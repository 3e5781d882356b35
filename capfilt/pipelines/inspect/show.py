"""show: a recipe or an architecture in full, every default spelled out, after checking that its parts meet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from capfilt import config as configs
from capfilt import presets
from capfilt.config import Config
from capfilt.data.policy import PolicyConfig
from capfilt.errors import RecipeError, did_you_mean
from capfilt.models import FAMILIES, read_architecture
from capfilt.pipelines import pretrain
from capfilt.pipelines.bootstrap import checks
from capfilt.pipelines.bootstrap.config import BootstrapConfig
from capfilt.pipelines.pretrain import PretrainConfig
from capfilt.stages.annotate import AnnotateConfig

KINDS: dict[str, tuple[type[Config], ...]] = {
    "bootstrap": (BootstrapConfig,),
    "pretrain": (PretrainConfig,),
    "annotate": (AnnotateConfig,),
    "select": (PolicyConfig,),
    "models": tuple(family.config for family in FAMILIES.values()),
}
"""What each folder of presets holds."""


def resolved(name: str, sets: Sequence[str]) -> Config:
    """Read a preset of either shelf, or a YAML of the user's, with every default; RecipeError unless its parts meet."""
    kind = kind_of(name)
    if kind == "models":
        return read_architecture(presets.find("models", name), sets)
    config = configs.read(presets.find("pipelines", name, within=kind), KINDS[kind][0], sets)
    if isinstance(config, BootstrapConfig):
        checks.check(config)
    elif isinstance(config, PretrainConfig):
        pretrain.check(config)
    return config


def kind_of(name: str) -> str:
    """Tell the folder that a preset lies in, or that a YAML would lie in: that of what it extends, else by its keys."""
    if not name.endswith((".yaml", ".yml")):
        return folder_of(name)
    keys = configs.load(Path(name))
    if isinstance(parent := keys.get("extends"), str):
        if not parent.endswith((".yaml", ".yml")):
            return folder_of(parent)
        # One level, as `configs.read` allows: what the parent extends is not asked.
        keys = {**configs.load(Path(name).parent / parent), **keys}
    known = {kind: max(len(keys.keys() & one.model_fields.keys()) for one in of) for kind, of in KINDS.items()}
    return max(known, key=lambda kind: known[kind])


def folder_of(name: str) -> str:
    """Tell the folder of a preset, with or without which it may be named."""
    recipes, models = presets.names("pipelines"), presets.names("models")
    for known in recipes:
        folder, _, short = known.partition("/")
        if name in (known, short):
            return folder
    if name in models:
        return "models"
    every = [*recipes, *models]
    hint = did_you_mean(name, [*every, *(recipe.partition("/")[2] for recipe in recipes)])
    raise RecipeError(f"there is no preset {name!r}.{hint} There are: {', '.join(every)}. A path to a .yaml works too.")
