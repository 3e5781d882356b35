"""The verbs of the first hour, as functions: look at data and machine, estimate, check the machine."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from capfilt.api import arguments
from capfilt.api.arguments import Location, Price, Settings, Specs, assignments, location, names_of, price_of
from capfilt.api.progress import OnLog, OnProgress, progress_of
from capfilt.api.results import Record
from capfilt.errors import UsageError

if TYPE_CHECKING:
    from capfilt.pipelines.estimate.verb import Work
    from capfilt.runs.progress import Progress
    from capfilt.storage.paths import StoragePath

Interval = tuple[float, float | None, float | None]
"""A value with the ends of its 95 % interval; None where a single measurement says nothing of its spread."""


@dataclass(frozen=True)
class InitResult:
    """Recipes that were written for some data."""

    recipes: tuple[StoragePath, ...]
    data: Record
    """What a sample of the data is like."""
    machine: Record
    """CPUs, GPUs, memory, disk."""
    next: tuple[str, ...]
    """The commands that use the recipes, in their order."""
    record: Record = field(repr=False)


@dataclass(frozen=True)
class EstimateResult:
    """What the whole will take, keep and cost, each with its 95 % interval."""

    out: StoragePath
    """The folder with the sample, its annotations, its selection and their report."""
    samples: Interval
    hours: Interval
    usd: Interval | None
    """Where a price was given for everything that is used."""
    kept_images: Interval
    """A share."""
    failed: Interval
    """A share."""
    bytes_out: Interval
    report: StoragePath
    record: Record = field(repr=False)


@dataclass(frozen=True)
class DoctorResult:
    """What of this machine is fit for work."""

    checks: tuple[Record, ...]
    """Each with `name`, `state` ("ok", "warning", "broken"), `found`, and `do` where something is to be done."""
    record: Record = field(repr=False)

    @property
    def ok(self) -> bool:
        """Whether nothing must be mended."""
        return all(check["state"] != "broken" for check in self.checks)


def init(
    data: Specs,
    *,
    out: Location = "capfilt.yaml",
    captioner: Location | None = None,
    filter: Location | None = None,
    human: Location | None = None,
    val: Location | None = None,
    test: Location | None = None,
    keep_rate: float | None = None,
    address: str = "start",
    seed: int = 0,
    force: bool = False,
    on_progress: OnProgress | Progress | None = None,
    on_log: OnLog | None = None,
) -> InitResult:
    """Look at a sample of some data and at this machine, and write a commented recipe that runs as it is.

    Args:
        data: shards, a folder of pictures, or lists of URLs.
        out: the recipe, a YAML of this machine; without `human` a second one for `select` lies beside it.
        captioner, filter: models as `annotate` takes them; by default public ones of BLIP.
        human: clean pairs: the recipe is then one of `bootstrap`, with `val` and `test` where they are given.
        keep_rate: the share of texts to keep; by default a threshold decides.
        address: where the commands will run; a running cluster is asked for its CPUs and GPUs.
        seed: of the sample.
        force: replace recipes that are there.

    Raises:
        CapfiltError: NoShardError where there is no such data, DataError where none of it can be read, UsageError for
            a recipe that is there already.
    """
    from pathlib import Path

    if keep_rate is not None and not 0 < keep_rate <= 1:
        raise UsageError(f"--keep-rate {keep_rate}: give a share above 0 and at most 1.")
    if human is None and (extra := [name for name, value in (("val", val), ("test", test)) if value is not None]):
        raise UsageError(f"--{extra[0]} is for a recipe of the whole loop: give --human PAIRS too.")
    path = location(out)
    if not isinstance(path, Path):
        raise UsageError(f"--out {out} is on a store; a recipe is a file of this machine.")
    roles = (captioner, filter, human, val, test)
    from capfilt.pipelines.init import recipe, verb

    where = arguments.working_address(address)
    answers = recipe.Answers(*(None if one is None else str(one) for one in roles), keep_rate=keep_rate)
    record = verb.run(names_of(data), path, answers, where, seed, force, progress_of(on_progress, on_log))
    next_ = tuple(shlex.join(["capfilt", *step["words"]]) for step in record["next"])
    recipes = tuple(location(name) for name in record["recipes"])
    return InitResult(recipes, record["data"], record["machine"], next_, record)


def estimate(
    data: Specs,
    *,
    out: Location,
    captioner: Location | None = None,
    filter: Location | None = None,
    recipe: Location | None = None,
    policy: Location | None = None,
    settings: Settings = (),
    threshold: float | str | None = None,
    score: str | None = None,
    keep_rate: float | None = None,
    val: Location | None = None,
    sample: int = 1000,
    seed: int = 0,
    max_shards: int = 32,
    address: str | None = None,
    workers: int = 0,
    cpus: float | None = None,
    gpus: float | None = None,
    price: Price | None = None,
    on_progress: OnProgress | Progress | None = None,
    on_log: OnLog | None = None,
) -> EstimateResult:
    """Annotate and select a seeded sample, and say what all of the data will take, keep and cost.

    Args:
        data: shards as `annotate` takes them; or a recipe of `bootstrap`, whose web shards one round cleans.
        out: a folder for the sample and what becomes of it; the same call on it goes on.
        captioner, filter: as of `annotate`; with a recipe, in place of those that the run trains.
        recipe: of `annotate`, a preset or a YAML; `settings` are keys of it, or of a recipe of `bootstrap`.
        policy: of `select`, a preset or a YAML; `threshold`, `score` and `keep_rate` as of `select`.
        val: human pairs, for a threshold that is calibrated.
        sample: how many samples are drawn, with `seed`, from at most `max_shards` shards.
        workers: of the whole run; 0: as many as measure the sample. `cpus` and `gpus` are of each.
        price: as in `annotate`; `usd` is of the whole.

    Raises:
        CapfiltError: UsageError or RecipeError for what does not fit, RunError for an `out` that holds another
            estimate, ShortfallError where nothing of the sample could be used.
    """
    names, rates = names_of(data), price_of(price)
    if sample < 1 or max_shards < 1 or workers < 0:
        raise UsageError("--sample and --max-shards are 1 or more, --workers 0 or more.")
    chosen = {"threshold": threshold, "score": score, "keep_rate": keep_rate}
    is_recipe = len(names) == 1 and _is_recipe(names[0])
    if not is_recipe:
        config = arguments.annotate_config(recipe, assignments(settings))
        rule = arguments.policy(policy, chosen, ())
        arguments.check_annotate((captioner, filter), (), {"--scores": ()})
    elif others := [name for name, value in {**chosen, "recipe": recipe, "policy": policy, "val": val}.items() if value]:
        raise UsageError(f"{names[0]} is a recipe, which says this itself: leave out --{others[0].replace('_', '-')}.")
    show = progress_of(on_progress, on_log)
    with show.wait("importing libraries"):
        from capfilt.pipelines.estimate import verb
    with arguments.driving():
        if is_recipe:
            roles = (None if captioner is None else str(captioner), None if filter is None else str(filter))
            work: Work = verb.of_recipe(names[0], assignments(settings), *roles)
        else:
            where = None if val is None else str(val)
            work = verb.Work(tuple(names), str(captioner), str(filter), config, rule, val=where)
        options = arguments.options(cpus=cpus, gpus=gpus)
        asked = verb.Question(sample, seed, max_shards, workers, rates)
        record = verb.run(arguments.working_address(address), work, asked, location(out), options, show)
    figures = {name: interval_of(record.get(name)) for name in ("samples", "hours", "usd", "kept_images", "failed", "bytes_out")}
    return EstimateResult(location(out), report=location(record["report"]), record=record, **figures)  # type: ignore[arg-type]


def _is_recipe(name: str) -> bool:
    from capfilt import presets

    return name.endswith((".yaml", ".yml")) or f"bootstrap/{name.removeprefix('bootstrap/')}" in presets.names("pipelines")


def interval_of(figure: Any) -> Interval | None:
    """A figure of a record; None where it is absent."""
    return None if figure is None else (figure["value"], figure.get("low"), figure.get("high"))


def doctor(
    *,
    folder: Location = ".",
    address: str = "start",
    on_progress: OnProgress | Progress | None = None,
    on_log: OnLog | None = None,
) -> DoctorResult:
    """Check packages, limits, disk, stores, GPUs and Ray; nothing is mended, and no secret is read.

    Args:
        folder: where run folders will lie, on this machine.
        address: "start" starts a Ray and ends it, "auto" or HOST:PORT asks one that runs, "local" asks none.

    Raises:
        AddressError: an address of no form that there is.
    """
    from pathlib import Path

    from capfilt.pipelines.inspect import doctor as pipeline

    where = location(folder)
    if not isinstance(where, Path):
        raise UsageError(f"{folder} is on a store; --out is here a folder of this machine.")
    record = pipeline.run(arguments.working_address(address), where, progress_of(on_progress, on_log))
    return DoctorResult(tuple(record["checks"]), record)
