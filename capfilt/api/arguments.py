"""Arguments of the public functions as the pipelines take them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from capfilt.errors import UsageError

if TYPE_CHECKING:
    from capfilt.config import C
    from capfilt.data.policy import PolicyConfig
    from capfilt.evaluation.config import EvaluateConfig
    from capfilt.inference.config import AnnotateConfig
    from capfilt.stages.runner import CommandOptions
    from capfilt.storage.paths import StoragePath
    from capfilt.storage.remote_path import RemotePath

Location: TypeAlias = "str | os.PathLike[str] | RemotePath"
"""A path of this machine, or a URL of a store that fsspec knows."""

Specs: TypeAlias = "Location | Sequence[Location]"
"""Shards or lists: files, folders, globs, braces, `a::b` lists, fsspec URLs; one or several."""

Settings: TypeAlias = "Mapping[str, Any] | Sequence[str]"
"""Keys of a recipe to set otherwise: `{"decode.method": "beam", "batch_size": 128}`, or the words of the command line's
`--set`, `["decode.method=beam", "batch_size=128"]`."""


def location(where: Location) -> StoragePath:
    """A place, as a path of this machine or of a store."""
    from capfilt.storage.paths import storage_path

    return storage_path(os.fspath(where) if isinstance(where, os.PathLike) else where)


def name_of(where: Location) -> str:
    """A place as a person would write it; not checked, since it may be a preset or a name on the Hugging Face hub."""
    return str(where)


def names_of(specs: Specs) -> list[str]:
    """What names shards or lists, one or several."""
    several = isinstance(specs, Sequence) and not isinstance(specs, str)
    return [str(spec) for spec in specs] if several else [str(specs)]  # type: ignore[union-attr]


def assignments(settings: Settings, **given: object) -> list[str]:
    """Settings as `--set` has them, so that both are checked alike; after them what is `given` and not None."""
    if isinstance(settings, str):
        raise UsageError(f"settings is the text {settings!r}; give a mapping or a list of texts 'a.b=c'.")
    named = settings.items() if isinstance(settings, Mapping) else ()
    words = [f"{key}={_written(key, value)}" for key, value in named] or [str(word) for word in settings]
    return [*words, *(f"{key}={_written(key, value)}" for key, value in given.items() if value is not None)]


def _written(key: str, value: object) -> str:
    """A value as JSON, which the YAML of a recipe takes."""
    try:
        return json.dumps(value, ensure_ascii=False, default=_text)
    except (TypeError, ValueError) as error:
        raise UsageError(f"settings: {key!r} is a {type(value).__name__}: {error}; give what YAML can hold.") from None


def _text(value: object) -> str:
    from capfilt.storage.remote_path import RemotePath

    if isinstance(value, os.PathLike | RemotePath):
        return str(value)
    raise TypeError(f"a {type(value).__name__} cannot be written")


def check_syntax(folder: str, recipe: Location | None, sets: Sequence[str]) -> None:
    """Raise RecipeError for what is wrong with a recipe's name, its YAML or the form of its settings.

    Called before torch is imported, so that such an error is shown within a second.
    """
    from capfilt import config as configs

    configs.check_syntax(None if recipe is None else str(recipe), sets, folder)


def read_recipe(verb: str, recipe: Location, kind: type[C], sets: Sequence[str]) -> C:
    """A recipe of a verb, by the name of a preset or by path. RecipeError where it does not fit."""
    from capfilt import config as configs
    from capfilt import presets

    return configs.read(presets.find("pipelines", str(recipe), within=verb), kind, sets)


def annotate_config(recipe: Location | None, sets: Sequence[str]) -> AnnotateConfig:
    """How texts are written and scored, checked before torch is imported."""
    from capfilt import config as configs
    from capfilt.inference.config import AnnotateConfig

    return configs.read_named(AnnotateConfig, None if recipe is None else str(recipe), sets)


def evaluate_config(sets: Sequence[str]) -> EvaluateConfig:
    """How a model is evaluated, checked before torch is imported."""
    from capfilt import config as configs
    from capfilt.evaluation.config import EvaluateConfig

    return configs.build(EvaluateConfig, sets)


def policy(
    recipe: Location | None, sets: Sequence[str], by_labels: bool, val: Location | None, filter: Location | None
) -> PolicyConfig:
    """The policy of a selection. UsageError for a threshold beside `by_labels`, which sets one itself."""
    from capfilt import config as configs
    from capfilt.data.policy import PolicyConfig

    if by_labels:
        has_threshold = any(assignment.partition("=")[0].strip() == "threshold" for assignment in sets)
        if has_threshold or val or filter:
            raise UsageError(
                "--calibrate labels sets the threshold itself; leave out threshold=..., --val and --filter."
            )
        sets = [*sets, "threshold=calibrated"]
    return configs.read_named(PolicyConfig, None if recipe is None else str(recipe), sets)


def run_folder(out: Location, fork: Location | None) -> StoragePath:
    """The run folder to work in: `out`, or a fork of it in the folder that `fork` names."""
    from capfilt.runs import run

    return location(out) if fork is None else run.fork(location(out), location(fork))


def options(**given: object) -> CommandOptions:
    """What a call asks of the place where it works. RecipeError for what cannot be."""
    from capfilt import config as configs
    from capfilt.stages.runner import CommandOptions

    return configs.validate(CommandOptions, given, "arguments")


def working_address(address: str | None) -> str:
    """Where a call works; without an address where the caller's process works already, so that none starts a Ray."""
    from capfilt.cluster.session import current_address

    return current_address() if address is None else address


def out_of(recipe: Location, out: Location | None) -> Location:
    """The run folder of a recipe: `out`, else runs/RECIPE."""
    return f"runs/{Path(str(recipe)).stem}" if out is None else out


@contextmanager
def driving() -> Iterator[None]:
    """Work on a run folder as its one driver; at the end its lock is let go, and torch's random state is as before."""
    from capfilt.runs.locking import lock

    with lock.driving(), _same_random_state():
        yield


@contextmanager
def _same_random_state() -> Iterator[None]:
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        yield
