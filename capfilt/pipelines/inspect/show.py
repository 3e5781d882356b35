"""show: print a recipe or an architecture with every default, after checking that its parts fit together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from capfilt import config as configs
from capfilt import presets
from capfilt.config import Config
from capfilt.data.policy import PolicyConfig
from capfilt.inference.config import AnnotateConfig
from capfilt.models import FAMILIES, read_architecture
from capfilt.objectives.tasks import unsaid
from capfilt.pipelines import pretrain, tokenizer_checks
from capfilt.pipelines.bootstrap import checks
from capfilt.pipelines.bootstrap.config import BootstrapConfig
from capfilt.pipelines.finetune import FinetuneConfig
from capfilt.pipelines.pretrain import PretrainConfig
from capfilt.yaml_loader import load_yaml

KINDS: dict[str, tuple[type[Config], ...]] = {
    "bootstrap": (BootstrapConfig,),
    "pretrain": (PretrainConfig,),
    "finetune": (FinetuneConfig,),
    "annotate": (AnnotateConfig,),
    "select": (PolicyConfig,),
    "models": tuple(family.config for family in FAMILIES.values()),
}
"""The config classes of the presets in each folder: one of `pipelines/`, or all of `models/`."""


def resolved(name: str, sets: Sequence[str]) -> Config:
    """The verb: read a preset of `pipelines/` or `models/`, or a YAML. RecipeError unless its parts fit together."""
    kind = kind_of(name)
    if kind == "models":
        return read_architecture(presets.find("models", name), sets)
    config = configs.read(presets.find("pipelines", name, within=kind), KINDS[kind][0], sets)
    if isinstance(config, BootstrapConfig):
        checks.check(config)
    elif isinstance(config, PretrainConfig):
        pretrain.check(config)
    return config


def notes(config: Config) -> Iterator[str]:
    """What of a recipe may not be meant so, and what is not on this machine and could not be checked."""
    if not isinstance(config, BootstrapConfig | PretrainConfig):
        return
    if isinstance(config, BootstrapConfig):
        architecture, texts = checks.check(config)[0], checks.texts_of(config)
        lengths = checks.warnings_of_lengths(config, architecture)
        splits = ("val", "test")
        places = [(f"data.{split}", spec) for split in splits if (spec := getattr(config.data, split)) is not None]
    else:
        architecture, texts = pretrain.check(config), pretrain.texts_of(config)
        lengths = tokenizer_checks.length_warnings(architecture, pretrain.lengths_of(config))
        places = []
        if said := unsaid(architecture, config.train.objectives):
            yield f"train.{said}"
    places = [(some.key, some.shards) for some in texts] + places
    absent = [] if tokenizer_checks.is_here(config.tokenizer) else [f"tokenizer ({config.tokenizer})"]
    absent += [key for key, spec in places if not tokenizer_checks.are_here(spec)]
    if absent:
        yield f"not found on this machine, so not checked: {', '.join(absent)}"
    yield from lengths
    here = (some for some in texts if some.key not in absent)
    yield from tokenizer_checks.text_warnings(config.tokenizer, architecture, here)


def kind_of(name: str) -> str:
    """The key of `KINDS` for a preset or a YAML: for a YAML that of what it extends, else the one that has most of its
    keys."""
    if not name.endswith((".yaml", ".yml")):
        return presets.folder_of(name)
    keys = load_yaml(Path(name))
    if isinstance(parent := keys.get("extends"), str):
        if not parent.endswith((".yaml", ".yml")):
            return presets.folder_of(parent)
        # One level, as `configs.read` allows: what the parent itself extends is not read.
        keys = {**load_yaml(Path(name).parent / parent), **keys}
    num_known = {
        kind: max(len(keys.keys() & config.model_fields.keys()) for config in configs_of_kind)
        for kind, configs_of_kind in KINDS.items()
    }
    return max(num_known, key=lambda kind: num_known[kind])
