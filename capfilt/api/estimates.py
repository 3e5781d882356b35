"""What a cleaning will take, keep and cost, as a function, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from capfilt.api import arguments
from capfilt.api.arguments import Location, Price, Settings, Specs, assignments, location, named, names_of, price_of
from capfilt.api.progress import OnLog, OnProgress, progress_of
from capfilt.api.results import Record
from capfilt.errors import UsageError

if TYPE_CHECKING:
    from capfilt.runs.progress import Progress
    from capfilt.storage.paths import StoragePath


@dataclass(frozen=True)
class EstimateResult:
    """What the whole will take, keep and cost."""

    out: StoragePath
    """The folder with the sample, its annotations and its selection."""
    figures: dict[str, dict[str, float]]
    """`hours`, `kept_images`, `failed`, `bytes_out` and others: each a `value` with `low` and `high`, the ends of its
    95 % interval; these are absent where a single measurement says nothing of its spread."""
    report: StoragePath
    """The page of the sample."""
    record: Record = field(repr=False)


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
    keep_rate: float | None = None,
    sample: int = 1000,
    seed: int = 0,
    address: str | None = None,
    workers: int = 0,
    cpus: float | None = None,
    gpus: float | None = None,
    price: Price | None = None,
    on_progress: OnProgress | Progress | None = None,
    on_log: OnLog | None = None,
    announce: Callable[[str], object] | None = None,
) -> EstimateResult:
    """Annotate and select a seeded sample, and say what all of the data will take, keep and cost.

    Args:
        data: shards as `annotate` takes them; or a recipe of `bootstrap`, whose web shards one round cleans.
        out: a folder for the sample and what becomes of it; the same call on it goes on.
        captioner, filter: as of `annotate`; with a recipe, in place of those that the run trains.
        recipe: of `annotate`, a preset or a YAML; `settings` are keys of it, or of a recipe of `bootstrap`.
        policy: of `select`, a preset or a YAML; `threshold` and `keep_rate` as of `select`.
        sample: how many samples are drawn, with `seed`.
        workers: of the whole run; 0: as many as measure the sample. `cpus` and `gpus` are of each.
        price, on_progress, on_log: as in `annotate`; with a price `figures` has the `usd` of the whole.
        announce: then serve the sample's texts to a person, until 100 are labelled, and call this with the page's
            address; `record["clicks"]` has the policy's precision and recall.

    Raises:
        CapfiltError: UsageError or RecipeError for what does not fit, RunError for an `out` that holds another
            estimate, ShortfallError where nothing of the sample could be used.
    """
    names, rates, settings = names_of(data), price_of(price), assignments(settings)
    given = {"threshold": threshold, "keep_rate": keep_rate}
    is_recipe = len(names) == 1 and _is_recipe(names[0])
    if is_recipe:
        _check_alone(names[0], {**given, "recipe": recipe, "policy": policy})
    else:
        config, rule = arguments.annotate_config(recipe, settings), arguments.policy(policy, given, ())
        arguments.check_annotate((captioner, filter), (), {"--scores": ()})
    show = progress_of(on_progress, on_log)
    with show.wait("importing libraries"):
        from capfilt.pipelines.estimate import verb

    if is_recipe:
        work = verb.of_recipe(names[0], settings, {"captioner": named(captioner), "filter": named(filter)})
    else:
        work = verb.Work(tuple(names), str(captioner), str(filter), config, rule)
    with arguments.working(show, out, address, {"cpus": cpus, "gpus": gpus}) as place:
        record = verb.run(place, work, verb.Question(sample, seed, workers, rates), announce)
    figures = {name: value for name, value in record.items() if isinstance(value, dict) and "value" in value}
    return EstimateResult(place.out, figures, location(record["report"]), record)


def _check_alone(recipe: str, said: Mapping[str, object]) -> None:
    """Raise UsageError for what a recipe of `bootstrap` says itself."""
    if extra := [name for name, value in said.items() if value]:
        raise UsageError(f"{recipe} is a recipe, which says this itself: leave out --{extra[0].replace('_', '-')}.")


def _is_recipe(name: str) -> bool:
    from capfilt import presets

    return name.endswith((".yaml", ".yml")) or f"bootstrap/{name}" in presets.names("pipelines")
