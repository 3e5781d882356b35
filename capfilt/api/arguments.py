"""Arguments of the public functions as the pipelines take them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from capfilt.errors import DataError, UsageError, did_you_mean

if TYPE_CHECKING:
    from capfilt.config import C
    from capfilt.data.policy import PolicyConfig
    from capfilt.evaluation.config import EvaluateConfig
    from capfilt.evaluation.tasks.config import TaskEvalConfig
    from capfilt.inference.config import AnnotateConfig
    from capfilt.runs import cost as runs_cost
    from capfilt.runs.progress import Progress
    from capfilt.stages.workload import Place
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


def located(where: Location | None) -> StoragePath | None:
    """`location` of what may be left out."""
    return None if where is None else location(where)


def named(where: Location | None) -> str | None:
    """A place as a person would write it; not checked, since it may be a preset or a name on the Hugging Face hub."""
    return None if where is None else str(where)


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


def check_annotate(
    models: tuple[Location | None, Location | None], add_score: Sequence[str], asked: Mapping[str, object]
) -> None:
    """Refuse an annotation without its two models, and with `add_score` what belongs to an annotation. UsageError.

    `asked`: the options that it does not go with, by name.
    """
    if isinstance(add_score, str) or isinstance(asked["--scores"], str):
        raise UsageError("scores are a list of texts, such as ['side', 'clip:MODEL']; give a list.")
    given = [name for name, value in zip(("--captioner", "--filter"), models, strict=True) if value is not None]
    if not add_score and len(given) < 2:
        missing = "--filter" if "--captioner" in given else "--captioner"
        raise UsageError(f"{missing} MODEL is needed; without it only scores can be added to a run, by --add-score.")
    if add_score and (others := [*given, *(name for name, value in asked.items() if value)]):
        raise UsageError(
            f"--add-score adds scores to what --out has annotated, and {others[0]} is of an annotation: leave one out."
        )


def evaluate_config(
    sets: Sequence[str],
    task: str | None = None,
    results: Location | None = None,
    classes: Location | None = None,
    templates: Location | None = None,
) -> EvaluateConfig | TaskEvalConfig:
    """How a model is evaluated, checked before torch is imported. `classes` and `templates` are files of lines.

    Raises:
        UsageError: a task that there is not, an option that it does not have, or a file that cannot be used.
    """
    from capfilt import config as configs
    from capfilt.data.tasks import read_names, read_templates
    from capfilt.evaluation.config import EvaluateConfig
    from capfilt.evaluation.tasks import TASKS, task_of

    known = None if task is None else task_of(task)
    if results is not None and (known is None or not known.has_answers):
        those = ", ".join(name for name, one in TASKS.items() if one.has_answers) or "none"
        raise UsageError(f"--results: {task or 'the evaluation without --task'} has no result file; of tasks: {those}.")
    if known is None:
        config: EvaluateConfig | TaskEvalConfig = configs.build(EvaluateConfig, sets)
    else:
        config = configs.build(known, sets)
    for name, file, read in (("classes", classes, read_names), ("templates", templates, read_templates)):
        if file is None:
            continue
        if name not in type(config).model_fields:
            raise UsageError(f"--{name} is of --task classification, not of {task or 'an evaluation without a task'}.")
        try:
            config = config.model_copy(update={name: read(location(file))})
        except DataError as error:
            raise UsageError(f"--{name}: {error}") from error
    return config


POLICY_OPTIONS = ("threshold", "score", "keep_rate", "samples_seen", "max_repeats", "top_k", "keep")
"""Keys of a policy that are options of `select` too."""


def policy(
    recipe: Location | None,
    given: Mapping[str, object],
    sets: Sequence[str],
    labelled: bool = False,
    calibration: Sequence[Location | None] = (),
) -> PolicyConfig:
    """The policy of a selection: the recipe, with `sets` and `given` over it.

    Args:
        given: options, by the keys of `POLICY_OPTIONS`; None for those that were not given.
        labelled: whether the threshold is calibrated on labels.
        calibration: what it is calibrated on otherwise, where that is given.

    Raises:
        UsageError: what is given contradicts itself, or has no effect.
        RecipeError: a value that does not fit.
    """
    from capfilt import config as configs
    from capfilt.data.policy import PolicyConfig
    from capfilt.recipe_tree import assign

    words = [*sets, *_policy_assignments(given, sets)]
    if labelled:
        if "threshold" in assign({}, words, PolicyConfig) or any(calibration):
            raise UsageError(
                "--calibrate labels sets the threshold itself; leave out --threshold, --keep-rate, --val and --filter."
            )
        words.append("threshold=calibrated")
    config = configs.read_named(PolicyConfig, None if recipe is None else str(recipe), words)
    if config.threshold is None and given.get("score") not in (None, config.rank):
        raise UsageError(
            f"--score {given['score']} has no effect without a threshold: texts are ranked by {config.rank};"
            f" --set rank={given['score']} ranks them by {given['score']}."
        )
    return config


def _policy_assignments(given: Mapping[str, object], sets: Sequence[str]) -> list[str]:
    """Options of `select` as `--set` would have them, with what they imply; errors as of `policy`."""
    from capfilt import config as configs
    from capfilt.data.policy import PolicyConfig
    from capfilt.recipe_tree import assign

    assigned = assign({}, sets, PolicyConfig)
    words = []
    for key, value in given.items():
        if value is None:
            continue
        option, wanted = f"--{key.replace('_', '-')}", _threshold(value) if key == "threshold" else value
        if wanted != "fused":  # which means something with its weights alone, in the recipe or a setting
            configs.validate(PolicyConfig, {key: wanted}, option)
        if key in assigned and assigned[key] != wanted:
            raise UsageError(f"{option} {value} and --set {key}={_shown(assigned[key])} differ; give one of them.")
        words.append(f"{key}={_written(key, wanted)}")
    shares = [key for key in ("keep_rate", "samples_seen") if given.get(key) is not None]
    if not shares:
        return words
    threshold = given.get("threshold")
    threshold = _shown(assigned.get("threshold", "keep-rate")) if threshold is None else threshold
    if threshold != "keep-rate":
        option = f"--{shares[0].replace('_', '-')} {given[shares[0]]}"
        raise UsageError(f"{option} sets the threshold itself, which is given as {threshold}; leave one out.")
    return [*words, "threshold=keep-rate"]


def _threshold(given: object) -> object:
    """A threshold of the command line as a recipe has it; None for "none"."""
    if given == "none":
        return None
    if given in ("calibrated", "keep-rate"):
        return given
    try:
        return float(given)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        known = ["calibrated", "keep-rate", "none"]
        raise UsageError(
            f"--threshold {given}: give a number, {', '.join(known[:-1])} or none.{did_you_mean(str(given), known)}"
        ) from None


def _shown(value: object) -> str:
    return "none" if value is None else str(value)


Price: TypeAlias = "str | Mapping[str, float]"
"""USD of a GPU-hour and of a CPU-hour: "gpu=3.0,cpu=0.05" or {"gpu": 3.0, "cpu": 0.05}; either may be left out."""


def price_of(given: Price | None) -> runs_cost.Price | None:
    """A price, parsed. UsageError for what is none."""
    from capfilt.runs.cost import Price as Parsed

    return None if given is None else Parsed.of(given)


def with_usage(record: dict[str, Any], folder: StoragePath, price: runs_cost.Price | None = None) -> dict[str, Any]:
    """The record of a verb with what its stages used and, with a price, what that cost."""
    from capfilt.runs.cost import figures

    return record | figures(folder, price)


def run_folder(out: Location, fork: Location | None) -> StoragePath:
    """The run folder to work in: `out`, or a fork of it in the folder that `fork` names."""
    from capfilt.runs import run

    return location(out) if fork is None else run.fork(location(out), location(fork))


def working_address(address: str | None) -> str:
    """Where a call works; without an address where the caller's process works already, so that none starts a Ray.

    AddressError for one of no form that there is, before anything is read or written.
    """
    from capfilt.cluster.session import check_address, current_address

    if address is None:
        return current_address()
    if address != "by-size":
        check_address(address)
    return address


@contextmanager
def working(
    show: Progress,
    out: Location,
    address: str | None,
    sizes: Mapping[str, object],
    fork: Location | None = None,
    retry: tuple[str, str | None] = ("", None),
) -> Iterator[Place]:
    """Work in a run folder as its one driver; `sizes` are fields of `CommandOptions`, `retry` a stage and what of it is
    to be done again. RecipeError for sizes that cannot be."""
    from capfilt import config as configs
    from capfilt.stages.runner import CommandOptions
    from capfilt.stages.workload import Place

    with driving():
        folder = run_folder(out, fork)
        if retry[1] is not None:
            from capfilt.stages import runner

            runner.withdraw_failed(folder, retry[0], retry[1])
        yield Place(working_address(address), folder, configs.validate(CommandOptions, sizes, "arguments"), show)


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
