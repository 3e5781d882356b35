"""bootstrap: CapFilt in rounds (BLIP section 3.3).

Round 0 pretrains on the uncleaned web: the baseline. Every later round fine-tunes a captioner and, apart from it, a
filter from the newest model (shared parameters would make the filter agree with the captioner: BLIP, Table 4), or takes
for a role a pretrained model or trains one of another architecture, lets them clean the same web shards, and pretrains
a new model on what is left, for as many steps as round 0 had. What the last round pretrains may be a BLIP-2 in its
stages (`final`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from capfilt import config as configs
from capfilt.cluster.session import Session, connect
from capfilt.data import shards
from capfilt.pipelines.bootstrap import steps, tasks
from capfilt.pipelines.bootstrap.checks import check, check_files, texts_of, warnings_of_lengths
from capfilt.pipelines.bootstrap.config import BootstrapConfig
from capfilt.pipelines.bootstrap.context import BootstrapContext, OpenedRun
from capfilt.pipelines.bootstrap.plan import compute_requests, plan_of
from capfilt.pipelines.bootstrap.pool.cleaning import check_held_out, clean_web
from capfilt.pipelines.bootstrap.pool.data import prepare_data
from capfilt.pipelines.bootstrap.roles.sources import open_roles
from capfilt.pipelines.inspect import report
from capfilt.pipelines.tokenizer_checks import text_warnings
from capfilt.reporting.collect import PAGE
from capfilt.runs.cost import usage_by_stage
from capfilt.runs.progress import Progress
from capfilt.runs.run import Run
from capfilt.runs.tally import Tally
from capfilt.stages.compute import decide
from capfilt.stages.evaluate import filter_figures
from capfilt.stages.train import check_features
from capfilt.storage import documents
from capfilt.storage.paths import StoragePath


def run(address: str, config: BootstrapConfig, out: StoragePath, progress: Progress) -> dict[str, Any]:
    """The verb: run a recipe in the run folder `out`; returns what `summary.json` says.

    Whatever can be refused is refused before a cluster is contacted.
    """
    check_features(out, *config.trainings.values(), *(stage.train for stage in config.final))
    with progress.wait("checking the recipe and the files that it names"):
        opened = open_run(config, out)
    with connect(address, show=progress) as session:
        return run_rounds(session, opened, progress)


def bootstrap(session: Session, config: BootstrapConfig, out: StoragePath, progress: Progress) -> dict[str, Any]:
    """The same in a session that the caller has opened."""
    return run_rounds(session, open_run(config, out), progress)


def open_run(config: BootstrapConfig, out: StoragePath) -> OpenedRun:
    """Check the recipe and open its run folder, which may be resumed with more rounds and with other resources.

    Raises:
        RecipeError: parts of the recipe do not fit together.
        ModelError: a checkpoint that it names is not there, or cannot be used as it is to be.
        RunError: the folder belongs to another run.
    """
    architecture, final = check(config)
    checked_tasks = tasks.check_tasks(config, architecture)
    check_files(config, architecture, final)
    tasks.check_files(config)
    lengths = warnings_of_lengths(config, architecture)
    for warning in (*lengths, *text_warnings(config.tokenizer, architecture, texts_of(config))):
        logging.getLogger(__name__).warning(warning)
    roles = open_roles(config, architecture)
    plan = plan_of(config, architecture, final, roles)
    run = Run.open(out, configs.to_yaml(config), plan)
    return OpenedRun(config, architecture, final, roles, run, checked_tasks)


def run_rounds(session: Session, opened: OpenedRun, progress: Progress) -> dict[str, Any]:
    """Run all rounds, from wherever the run folder is; returns what `summary.json` says."""
    config, run = opened.config, opened.run
    compute = decide(session, run, compute_requests(config, opened.roles), progress)
    run.log("begin", rounds=config.rounds)
    if not run.path("summary.json").is_file():  # of a run that has ended everything may be there already
        steps.start_trainings(session, opened)
    with timed(run, progress):
        folder = run.folder.absolute() / "data"
        more = tasks.world_splits(config)
        worker = config.cluster.select
        splits = prepare_data(session, config.data, config.seed, folder, worker, progress, more)
        splits = clean_web(session, config.data, splits, folder, worker, progress)
        check_held_out(session, splits, folder / "held-out", config.data.allow_contamination, worker, progress)
    context = BootstrapContext(session, opened, progress, splits, compute)
    rounds = [round_zero(context)]
    newest = context.folder(0, "pretrain", "checkpoint")
    for r in range(1, config.rounds + 1):
        rounds.append(capfilt_round(context, r, newest))
        newest = context.folder(r, "pretrain", "checkpoint")
    seconds = worked_seconds(run, (None, *range(config.rounds + 1)))
    summary = {"command": "bootstrap", "recipe": "recipe.yaml", "seconds": seconds, "rounds": rounds}
    if used := usage_by_stage(run.folder):
        summary["usage"] = used
    if not run.path("summary.json").is_file() or documents.read_json(run.path("summary.json")) != summary:
        run.write_summary(summary)
    run.log("end", seconds=seconds)
    if progress.num_worked or not run.path(PAGE).is_file():  # a rerun that had nothing to do writes nothing
        report.run(run.folder, web=splits["web"])
    return summary


def round_zero(context: BootstrapContext) -> dict[str, Any]:
    """The baseline: a model pretrained on the uncleaned web and the human pairs."""
    with timed(context.run, context.progress, 0):
        models = steps.pretrain(context, 0, newest=None)
        metrics = steps.evaluate(context, 0, models) | tasks.measure(context, 0, models)
    return summarise(context, 0, metrics)


def capfilt_round(context: BootstrapContext, r: int, newest: StoragePath) -> dict[str, Any]:
    """Caption, filter, pretrain: one round, from the newest model to the next."""
    with timed(context.run, context.progress, r):
        captioner = context.opened.roles["captioner"].captioner(context, r, newest)
        filter_model = context.opened.roles["filter"].model(context, r, newest)
        calibrated = steps.calibrate(context, r, filter_model)
        on_pairs = steps.measure_human_pairs(context, r, filter_model)
        steps.annotate(context, r, captioner, filter_model)
        selected, tally = steps.select(context, r, calibrated)
        models = steps.pretrain(context, r, newest)
        metrics = steps.evaluate(context, r, models) | tasks.measure(context, r, models)
    named, annotations = shards.by_name(context.splits["web"]), context.folder(r, "annotations")
    measured = filter_figures(named, annotations, selected.rule)
    number = {} if selected.rule.threshold is None else {"threshold": selected.rule.threshold}
    pool = {"pool": selected.pool} if selected.pool else {}
    figures = {**tally_figures(tally), **pool, "filter": {**number, **measured}, **on_pairs, **metrics}
    return summarise(context, r, figures)


def tally_figures(tally: Tally) -> dict[str, Any]:
    """A tally as `summary.json` has it; the noise ratio is the share of a source's texts that were dropped, of those
    that contain anything to read."""
    came, kept = tally.texts["in"], tally.texts["kept"]
    return {
        "samples_in": tally.samples["in"],
        "samples": {name: tally.samples[name] for name in ("kept", "dropped", "failed")},
        "kept": {source: kept[source] for source in came},
        "dropped": dict(tally.texts["dropped"]),
        "failed": dict(tally.failed),
        "noise_ratio": {source: round(1 - kept[source] / num, 4) for source, num in tally.num_scored().items() if num},
    }


def summarise(context: BootstrapContext, r: int, figures: dict[str, Any]) -> dict[str, Any]:
    """The entry of one round, also in the log; a figure that was not measured is absent."""
    entry = {"round": r, "seconds": worked_seconds(context.run, (r,)), **figures}
    context.run.log("round", **entry)
    return entry


@contextmanager
def timed(run: Run, progress: Progress, r: int | None = None) -> Iterator[None]:
    """Log how long this command worked on a round (None: on the data), also when it is interrupted."""
    started, before = time.monotonic(), progress.num_worked
    try:
        yield
    finally:
        if progress.num_worked > before:
            run.log("worked", round=r, seconds=round(time.monotonic() - started, 1))


def worked_seconds(run: Run, rounds: tuple[int | None, ...]) -> float:
    """The seconds that all commands on this run folder worked on some rounds; a rerun that had nothing to do adds
    none."""
    lines = documents.read_json_lines(run.path("log.jsonl"))
    seconds = (float(line["seconds"]) for line in lines if line["event"] == "worked" and line["round"] in rounds)
    return round(sum(seconds), 1)
