"""The verbs that do work in a run folder, as functions: the command line calls these, with a console to report to.

The same call on the same folder resumes: what is committed is not done again. Without an `address` the command line
starts a Ray for its command. A library that started a dozen processes in its caller's name would surprise, so here a
call works in the calling process, or on the Ray to which the caller has connected it (`ray.init`). That Ray is used
and left running, whatever happens.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from capfilt.api import arguments
from capfilt.api.arguments import (
    Location,
    Price,
    Settings,
    Specs,
    assignments,
    located,
    location,
    named,
    names_of,
    price_of,
    with_usage,
)
from capfilt.api.progress import OnLog, OnProgress, progress_of
from capfilt.api.results import (
    AnnotateResult,
    BootstrapResult,
    EvaluateResult,
    PretrainResult,
    Round,
    SelectResult,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from capfilt.runs.progress import Progress
    from capfilt.storage.paths import StoragePath


def annotate(
    shards: Specs,
    *,
    out: Location,
    captioner: Location | None = None,
    filter: Location | None = None,
    captions: int | None = None,
    recipe: Location | None = None,
    settings: Settings = (),
    seed: int = 0,
    val: Location | None = None,
    scores: Sequence[str] = (),
    add_score: Sequence[str] = (),
    without: Location | None = None,
    keep_vectors: bool = False,
    address: str | None = None,
    workers: int = 0,
    cpus: float | None = None,
    gpus: float | None = None,
    limit: float = 0,
    retry: str | None = None,
    min_success: float = 0,
    fork: Location | None = None,
    price: Price | None = None,
    on_progress: OnProgress | Progress | None = None,
    on_log: OnLog | None = None,
) -> AnnotateResult:
    """Write synthetic texts for the images of shards, score these and the web's; nothing is dropped.

    Args:
        shards: tars, or other data (docs/shards.md), by folders, globs, braces, fsspec URLs; one or several.
        out: the run folder, or its URL.
        captioner, filter: the models that write and score: a folder, a .pth of BLIP, a name on the Hugging Face hub; a
            captioner may be "hf:FOLDER-OR-NAME" or "openai:URL#MODEL". Both are needed, except with `add_score`.
        captions: texts to write for each image, sampled with `seed`; by default the recipe's number, 1.
        recipe: a preset of `pipelines/annotate/`, or a YAML.
        settings: keys of the recipe to set otherwise, such as `{"decode.method": "beam", "batch_size": 128}`.
        val: human pairs on which the filter is measured too (AUC against shuffled ones, `record["human_pairs"]`).
        scores: scores beside itm and itc to compute then, such as "side" or "clip:MODEL" (docs/scores.md).
        add_score: the same for shards that `out` has annotated already, and nothing else is done.
        without: the run folder of `dedup`: copies are left out, and what stands for them has their merged texts.
        keep_vectors: keep the filter's vectors of the pictures in `out`, as `embed` would.
        address, workers, cpus, gpus, limit, retry, min_success, fork, price, on_progress, on_log: `help(capfilt.api)`.

    Raises:
        CapfiltError: RecipeError for models or settings, RunError for a run folder that do not fit, and its other kin.
    """
    config, rates = arguments.annotate_config(recipe, assignments(settings, captions=captions)), price_of(price)
    asked = {"--captions": captions, "--recipe": recipe, "--set": settings, "--val": val, "--retry": retry}
    asked |= {"--without": without, "--keep-vectors": keep_vectors, "--fork": fork, "--scores": scores}
    arguments.check_annotate((captioner, filter), add_score, asked)
    sizes = {"workers": workers, "cpus": cpus, "gpus": gpus, "limit": limit, "min_success": min_success}
    show = progress_of(on_progress, on_log)
    with arguments.working(show, out, address, sizes, fork, ("annotate", retry)) as place:
        with show.wait("importing libraries"):
            from capfilt.pipelines import annotate as pipeline

        extras = pipeline.Extras(named(val), scores, add_score, located(without), keep_vectors)
        record = pipeline.run(place, names_of(shards), (str(captioner), str(filter)), seed, config, extras)
        return AnnotateResult.of(place.out, with_usage(record, place.out, rates))


def select(
    shards: Specs,
    *,
    annotations: Location | AnnotateResult,
    out: Location,
    recipe: Location | None = None,
    threshold: float | str | None = None,
    score: str | None = None,
    keep_rate: float | None = None,
    samples_seen: int | None = None,
    max_repeats: float | None = None,
    top_k: int | None = None,
    keep: Literal["all", "web-first", "best"] | str | None = None,
    settings: Settings = (),
    val: Location | None = None,
    filter: Location | None = None,
    calibrate: Literal["labels"] | None = None,
    without: Location | None = None,
    address: str | None = None,
    workers: int = 0,
    cpus: float | None = None,
    min_success: float = 0,
    fork: Location | None = None,
    on_progress: OnProgress | Progress | None = None,
    on_log: OnLog | None = None,
) -> SelectResult:
    """Apply a policy to annotations and write the cleaned shards; no model is loaded, unless to calibrate a threshold.

    Args:
        shards, annotations: shards, and the run folder of their `annotate`, its result, or a round of a bootstrap.
        out: the run folder, or its URL.
        recipe: a preset of `pipelines/select/`, or a YAML; by default itm >= 0.5, as CapFilt.
        threshold: a number, "calibrated", "keep-rate" or "none"; by default the recipe's, 0.5.
        score: what it is compared with: "itm" (the recipe's default), "itc", a score that was added, or "fused".
        keep_rate: the share of all texts to keep; it implies the threshold "keep-rate".
        samples_seen: of a training, which sets the share: none is seen more than `max_repeats` times, by default 4.
        top_k: how many of an image's texts are kept, 0 for all; without a threshold none applies.
        keep: of an image's texts that pass "all", "web-first" or "best" (docs/policies.md).
        settings: any key of the policy, such as `{"other_threshold": 0.3, "combine": "or"}`.
        val, filter: human pairs and the filter that scored, for the threshold "calibrated".
        calibrate: "labels" sets the threshold on the labels that people gave in `capfilt review`.
        without: the run folder of `dedup` or `decontaminate`: what these found goes.
        address, workers, cpus, min_success, fork, on_progress, on_log: `help(capfilt.api)`.

    Raises:
        CapfiltError: UsageError or RecipeError for a policy that cannot be, ShortfallError where it keeps nothing, ...
    """
    given = {"threshold": threshold, "score": score, "keep_rate": keep_rate, "top_k": top_k, "keep": keep}
    given |= {"samples_seen": samples_seen, "max_repeats": max_repeats}
    policy = arguments.policy(recipe, given, assignments(settings), calibrate is not None, (val, filter))
    show = progress_of(on_progress, on_log)
    with show.wait("importing libraries"):
        from capfilt.pipelines import select as pipeline

    source = annotations.out if isinstance(annotations, AnnotateResult) else location(annotations)
    calibration = pipeline.ThresholdSource(named(val), named(filter), calibrate is not None)
    sizes = {"workers": workers, "cpus": cpus, "min_success": min_success}
    with arguments.working(show, out, address, sizes, fork) as place:
        record = pipeline.run(place, names_of(shards), source, policy, calibration, located(without))
        return SelectResult.of(place.out, with_usage(record, place.out))


def bootstrap(
    recipe: Location = "demo",
    *,
    out: Location | None = None,
    rounds: int | None = None,
    settings: Settings = (),
    address: str | None = None,
    fork: Location | None = None,
    price: Price | None = None,
    on_progress: OnProgress | Progress | None = None,
    on_log: OnLog | None = None,
) -> BootstrapResult:
    """Caption, filter, pretrain, in rounds: the whole of CapFilt.

    Args:
        recipe: a preset of `pipelines/bootstrap/`, or a YAML.
        out: the run folder, or its URL; by default runs/RECIPE.
        rounds: after the baseline, which is round 0; by default the recipe's.
        settings: keys of the recipe to set otherwise, such as `{"seed": 1, "pretrain.steps": 1000}`.
        address: as in `annotate`; so are `fork`, `price`, `on_progress` and `on_log`.

    Raises:
        CapfiltError: RecipeError for a recipe whose parts do not fit together, RunError for a run folder that was
            planned otherwise, and its other kin.
    """
    sets, rates = assignments(settings, rounds=rounds), price_of(price)
    arguments.check_syntax("bootstrap", recipe, sets)
    where = arguments.working_address(address)
    show = progress_of(on_progress, on_log)
    with show.wait("importing libraries"):
        from capfilt.pipelines.bootstrap.config import BootstrapConfig

        config = arguments.read_recipe("bootstrap", recipe, BootstrapConfig, sets)
        from capfilt.pipelines.bootstrap.checks import check

        check(config)
        from capfilt.pipelines.bootstrap import rounds as pipeline
        from capfilt.reporting.collect import PAGE

    with arguments.driving():
        folder = arguments.run_folder(f"runs/{Path(str(recipe)).stem}" if out is None else out, fork)
        record = with_usage(pipeline.run(where, config, folder, show), folder, rates)
    done = tuple(
        Round(entry["round"], home := folder / f"round-{entry['round']}", _models(home), entry)
        for entry in record["rounds"]
    )
    return BootstrapResult(folder, done, folder / PAGE, record["seconds"], record)


def pretrain(
    recipe: Location,
    *,
    out: Location,
    settings: Settings = (),
    address: str | None = None,
    fork: Location | None = None,
    on_progress: OnProgress | Progress | None = None,
    on_log: OnLog | None = None,
) -> PretrainResult:
    """Pretrain or fine-tune one model on shards.

    Args:
        recipe: a preset of `pipelines/pretrain/`, or a YAML.
        out: the run folder, or its URL.
        settings: keys of the recipe to set otherwise, such as `{"data": "shards/", "train.steps": 1000}`.
        address: as in `annotate`, but that several workers need a Ray; so are `fork`, `on_progress` and `on_log`.

    Raises:
        CapfiltError: RecipeError for a recipe whose parts do not fit together, and its other kin.
    """
    return _trained("pretrain", recipe, out, settings, address, fork, progress_of(on_progress, on_log))


def finetune(
    recipe: Location,
    *,
    out: Location,
    settings: Settings = (),
    address: str | None = None,
    fork: Location | None = None,
    on_progress: OnProgress | Progress | None = None,
    on_log: OnLog | None = None,
) -> PretrainResult:
    """Fine-tune a model for a downstream task.

    Args:
        recipe: a preset of `pipelines/finetune/`, or a YAML.
        out: the run folder, or its URL.
        settings: keys of the recipe to set otherwise, such as `{"start": "runs/x/pretrain/checkpoint"}`.
        address: as in `annotate`, but that several workers need a Ray; so are `fork`, `on_progress` and `on_log`.

    Raises:
        CapfiltError: RecipeError for a recipe whose parts do not fit together, and its other kin.
    """
    return _trained("finetune", recipe, out, settings, address, fork, progress_of(on_progress, on_log))


def _trained(
    verb: Literal["pretrain", "finetune"],
    recipe: Location,
    out: Location,
    settings: Settings,
    address: str | None,
    fork: Location | None,
    show: Progress,
) -> PretrainResult:
    """Run a recipe of one of the two verbs that train one model."""
    sets = assignments(settings)
    arguments.check_syntax(verb, recipe, sets)
    with show.wait("importing libraries"):
        from capfilt.pipelines import finetune, pretrain

    kind = pretrain.PretrainConfig if verb == "pretrain" else finetune.FinetuneConfig
    config = arguments.read_recipe(verb, recipe, kind, sets)
    with arguments.working(show, out, address, {}, fork) as place:
        record = with_usage(pretrain.run(place.address, config, place.out, show), place.out)
    return PretrainResult(place.out, location(record["model"]), record)


def evaluate(
    model: Location | PretrainResult,
    shards: Specs,
    *,
    out: Location | None = None,
    settings: Settings = (),
    task: str | None = None,
    results: Location | None = None,
    classes: Location | None = None,
    templates: Location | None = None,
    address: str | None = None,
    workers: int = 0,
    cpus: float | None = None,
    on_progress: OnProgress | Progress | None = None,
    on_log: OnLog | None = None,
) -> EvaluateResult:
    """Retrieval and captioning metrics of a model on held-out pairs, filter metrics on web texts of known truth; or
    the figures of a task (docs/tasks.md).

    Args:
        model: a model's folder, a .pth of BLIP or LAVIS, a name on the Hugging Face hub, or what `pretrain` returned.
        shards: held-out pairs, or web texts of known truth.
        out: a run folder to keep metrics.json in; by default none is kept.
        settings: such as `{"rerank": 128, "decode.method": "greedy"}`.
        task: one of `classification`, `grounding`, ...; by default what a filter and a captioner are measured by.
        results: where the answers are written as the task's server takes them, for tasks that have one.
        classes: for classification, a text file of classes; by default the one beside the shards.
        templates: for classification, a text file of prompts with {}; by default the one beside the shards.
        address: as in `select`; so are `workers`, `cpus`, `on_progress` and `on_log`.

    Raises:
        CapfiltError: ModelError or RecipeError for a model that cannot be evaluated, and its other kin.
    """
    config = arguments.evaluate_config(assignments(settings), task, results, classes, templates)
    show = progress_of(on_progress, on_log)
    with show.wait("importing libraries"):
        from capfilt.pipelines import evaluate as pipeline

    name = str(model.model if isinstance(model, PretrainResult) else model)
    sizes = {"workers": workers, "cpus": cpus, "gpus": None}
    with tempfile.TemporaryDirectory() as scratch:
        folder = f"{scratch}/run" if out is None else out
        with arguments.working(show, folder, address, sizes) as place:
            record = pipeline.run(place, name, names_of(shards), config, located(results))
    return EvaluateResult(name, located(out), record, record)


def _models(home: StoragePath) -> dict[str, StoragePath]:
    """The models of a round, by the names of their folders."""
    from capfilt.storage.paths import listing

    return {name: home / name / "checkpoint" for name in sorted(listing(home)) if (home / name / "checkpoint").is_dir()}
