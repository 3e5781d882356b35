"""pretrain: train one model on shards, under Ray Train.

Fine-tuning a captioner or a filter is the same with another job.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capfilt import models
from capfilt.cluster.ray_train import fit, prepare
from capfilt.cluster.session import Session, bound_threads
from capfilt.data import shards
from capfilt.data.loading.config import Source
from capfilt.errors import RecipeError
from capfilt.inference.roles import preprocess_for
from capfilt.models import Architecture
from capfilt.models.checkpoints import files, store
from capfilt.models.checkpoints.initial_weights import InitialConfig
from capfilt.objectives.tasks import unsaid, unsupported
from capfilt.runs import metrics
from capfilt.runs.ledger import Ledger, fingerprint
from capfilt.runs.progress import Progress, StageLine
from capfilt.runs.stage_status import StagePlan, write_plan
from capfilt.runs.tally import Tally
from capfilt.stages.compute import metered
from capfilt.stages.count_pairs import WrittenShard, count_regions, count_rows, shard_digests, written_shards
from capfilt.storage import documents
from capfilt.storage.atomic import sha256_file, write_json
from capfilt.storage.local_copies import local_copy
from capfilt.storage.paths import StoragePath, listing, remove_file, remove_folder
from capfilt.storage.remote_path import RemotePath
from capfilt.training.config import EXECUTION_FIELDS, ExecutionConfig, TrainConfig, TrainResources
from capfilt.training.job import LOG, PROGRESS, STATES, TrainJob

if TYPE_CHECKING:
    from capfilt.training.log import OnLog

FEW = 100
"""Shards up to which each is read before the first step, whoever wrote it: that takes seconds and finds damage."""
ROWS = "rows.json"
"""Tells a training's processes how many rows each shard has, and its sha256; gone when it ends."""


def check_training(architecture: Architecture, config: TrainConfig, resources: TrainResources, where: str) -> None:
    """Refuse a training whose objectives need what the model cannot do, or whose batch cannot be split."""
    chunks = resources.micro_batches
    if said := unsupported(architecture, config.objectives, chunks):
        raise RecipeError(f"{where}: {said}")
    if config.features and not architecture.frozen_vision:
        raise RecipeError(f"{where}: features are kept of a frozen tower, and this one is trained: set features=false.")
    if config.loader.batch_size % resources.workers:
        raise RecipeError(
            f"{where}: batch_size {config.loader.batch_size} cannot be split over {resources.workers} workers;"
            f" make it a multiple of {resources.workers}."
        )
    if config.loader.batch_size % (resources.workers * chunks):
        raise RecipeError(
            f"{where}: batch_size {config.loader.batch_size} cannot be split into {chunks} micro_batches of each of"
            f" {resources.workers} workers; make it a multiple of {resources.workers * chunks}."
        )
    if config.recompute > architecture.vision_depth:
        raise RecipeError(
            f"{where}: recompute {config.recompute}, and the vision tower has {architecture.vision_depth} blocks."
        )


def identity(job: TrainJob, contents: Mapping[str, str]) -> str:
    """The fingerprint of what a training ends with: its settings, what it starts from and what it reads, of which
    `contents` has the sha256 by the shards' urls."""
    elsewhere = dict.fromkeys(("out", "start", "sources", "tokenizer", "rows", "execution", "compute"), True)
    settings = job.model_dump(mode="json", exclude={**elsewhere, "train": EXECUTION_FIELDS})
    settings["train"]["features"] = bool(job.train.features)  # not where they lie
    settings["train"]["precision"] = job.compute.precision  # a training may go on on another kind of device
    settings["initial"] = {tower: known_by(source) for tower, source in settings["initial"].items()}
    start = [store.fingerprint(job.start)] if job.start else []
    if job.start and (job.start / store.MOMENTUM).is_file():
        start.append(sha256_file(job.start / store.MOMENTUM))
    walked = [(shards.expand(source.shards), source.repeat) for source in job.sources]
    inputs = [(shards.name(url), contents[url], repeat) for urls, repeat in walked for url in urls]
    return fingerprint(settings, start, inputs, job.load_tokenizer().identity)


def known_by(source: str | None) -> object:
    """A checkpoint by its weights, wherever it lies; one of the hub by its name."""
    file = files.weights_file(local_copy(source)) if source is not None else None
    return source if file is None else [sha256_file(part) for part in files.parts(file)]


def run_training(
    session: Session,
    job: TrainJob,
    resources: TrainResources,
    show: Progress,
    label: str,
    made: Mapping[str, str] | None = None,
    counts: StoragePath | None = None,
) -> StoragePath:
    """Train, unless the ledger has this very training; returns the folder of the model.

    The ledger lies beside the job's folder: `out/../ledger/NAME/model.json`. `made` has the sha256 of the shards that
    the run made itself (`stage.digests`); others are read once. That and how many rows the shards have stays known in
    the folder `counts` (by default beside the job's).
    """
    counts, urls = counts or job.out.parent, [url for source in job.sources for url in shards.expand(source.shards)]
    written = written_shards(urls) if len(urls) >= FEW else {}
    made = {url: one.sha256 for url, one in written.items()} | dict(made or {})
    contents = shard_digests(session, urls, made, counts, show)
    ledger, wanted = Ledger(job.out.parent, job.out.name), identity(job, contents)
    done = ledger.completion("model", wanted) is not None
    if not done:
        start_processes(session, job.out, resources, label)
        job = _prepared(session, job, resources, show, label, counts, contents, written)
    with show.stage(label, job.train.steps, "steps") as line:
        if done:
            line.resume(job.train.steps)
            remove_folder(job.out / STATES)  # a kill may have come before
            return job.model_folder
        write_plan(
            ledger, StagePlan(label, job.train.steps, unit="steps", log=f"{job.out.name}/{LOG}"), {"model": wanted}
        )
        _fit(session, job, resources, ledger, line)
    outputs = [job.model_folder / name for name, stat in sorted(listing(job.model_folder).items()) if stat is not None]
    ledger.commit("model", wanted, outputs, Tally.zero())
    remove_file(job.out / ROWS)
    remove_folder(job.out / STATES)
    return job.model_folder


def start_processes(session: Session, out: StoragePath, resources: TrainResources, label: str) -> None:
    """Start the processes of the training that leaves its model in `out`, where they can wait for it."""
    workers, cpus, gpus = resources.workers, resources.cpus, resources.gpus
    # torch imports its compiler, which takes as long as torch itself, when the first optimizer is made.
    modules = ("capfilt.training.loop", "torch._dynamo")
    prepare(session, workers, cpus, gpus, storage=out / "ray", name=label.replace(" ", "-"), modules=modules)


def _fit(session: Session, job: TrainJob, resources: TrainResources, ledger: Ledger, line: StageLine) -> None:
    """Run the processes of a training, and show, report and write down what they do."""
    batch, objectives = job.train.loader.batch_size, job.train.objectives.losses
    workers = 1 if session.local else resources.workers
    meter = metered(session, job, ledger, resources)

    def report(newest: dict[str, Any], steps: int) -> None:
        meter.work(workers * steps * newest.get("step_seconds", 0.0))
        meter.end(steps, steps * batch)
        session.report(metrics.training_readings(job.out.name, newest, steps, steps * batch, objectives))

    tail = Tail(job.out / LOG, line, report)
    line.wait("the first line of the training's log")
    try:
        with meter:
            for rank in range(workers):
                meter.hold(f"rank {rank}")
            fit(
                session,
                partial(train_here, on_line=tail.follow) if session.local else train_here,
                {"job": job.model_dump(mode="json")},
                workers=workers,
                cpus=resources.cpus,
                gpus=resources.gpus,
                storage=job.out / "ray",
                name=line.label.replace(" ", "-"),
                poll=tail.glance,
            )
            tail.poll()
    except CallbackInterrupt as interrupt:
        raise interrupt.error from None


def _prepared(
    session: Session,
    job: TrainJob,
    resources: TrainResources,
    show: Progress,
    label: str,
    counts: StoragePath,
    contents: Mapping[str, str],
    written: Mapping[str, WrittenShard],
) -> TrainJob:
    """The job as its workers need it, with what they would each count beside it."""
    warn_of_lanes(job, 1 if session.local else resources.workers)
    if said := unsaid(job.architecture, job.train.objectives):
        logging.getLogger(__name__).warning("%s: %s", label, said)
    kind = job.train.objectives.row_kind
    rows = count_rows(session, job.sources, job.train.loader.captions, counts, show, kind, written)
    execution = ExecutionConfig(**resources.model_dump(include=set(ExecutionConfig.model_fields)))
    kept = job.train.features  # workers may start elsewhere
    settings = job.train.model_copy(update={"features": kept.absolute() if isinstance(kept, Path) else kept})
    counted: dict[str, Any] = {"rows": rows, "contents": contents}
    if job.train.objectives.region_steps is not None:
        counted["regions"] = count_regions(session, job.sources, counts, show)
    write_json(job.out / ROWS, counted)
    return job.model_copy(update={"rows": job.out / ROWS, "execution": execution, "train": settings})


def warn_of_lanes(job: TrainJob, workers: int) -> None:
    """Tell of workers that read the same places of the data: twice the traffic where two share one."""
    loader = job.train.loader
    lanes = math.gcd(loader.lanes, loader.batch_size)
    if workers > lanes:
        logging.getLogger(__name__).warning(
            "%d workers read the data in %d lanes, several of them the same: let %d divide loader.lanes (%d) and "
            "loader.batch_size (%d)", workers, lanes, workers, loader.lanes, loader.batch_size,
        )  # fmt: skip


def train_here(config: dict[str, Any], on_line: OnLog | None = None) -> None:
    """What a training process runs; `on_line` gets each line of the log, in a session that is this process."""
    from capfilt.training.loop import train  # torch: not before a recipe is checked

    bound_threads()
    train(TrainJob.model_validate(config["job"]), on_line)


class CallbackInterrupt(KeyboardInterrupt):
    """What a caller's callback raised in the middle of a training in this process, which ends as by Ctrl-C."""

    def __init__(self, error: Exception):
        super().__init__(str(error))
        self.error = error


class Tail:
    """Follows a training's log: moves its progress line, and reports each newest line with the steps since the last."""

    PAUSE = 10.0
    """Seconds between two glances at a log that lies on a store: each is a request."""

    def __init__(self, path: StoragePath, line: StageLine, report: Callable[[dict[str, Any], int], None]):
        self.path, self.line, self.report = path, line, report
        newest = self._newest()
        self.step: int | None = newest["step"] if newest else None
        self._looked = 0.0

    def follow(self, _line: dict[str, Any]) -> None:
        """`poll`, called by a training in this process at each line of its log."""
        try:
            self.poll()
        except Exception as error:
            raise CallbackInterrupt(error) from error

    def glance(self) -> int:
        """`poll`, as often as is decent; the last step that is known where a store does not answer."""
        if not isinstance(self.path, RemotePath):
            return self.poll()
        if time.monotonic() >= self._looked + self.PAUSE:
            self._looked = time.monotonic()
            with suppress(OSError):  # the training goes on without its log being read
                return self.poll()
        return self.step or 0

    def poll(self) -> int:
        """Show the newest line of the log, if there is a new one; before the first, how far the features are.

        Returns: the last step that is known.
        """
        with suppress(FileNotFoundError):  # there only while features are computed
            progress = documents.read_object(self.path.with_name(PROGRESS))
            self.line.update(0, f"features of {progress['done']} of {progress['of']} shards")
        newest = self._newest()
        if newest is None:
            return self.step or 0
        is_new = newest["step"] != self.step
        if self.step is None:  # a fork goes on from a step of another log
            self.step = next(documents.read_json_lines(self.path), {}).get("resumed", 0)
        losses = (f"{name} {newest[name]:.3f}" for name in ("itc", "itm", "lm", "mlm") if name in newest)
        self.line.update(newest["step"], f"{' '.join(losses)}  {newest['samples_per_second']:.0f} pairs/s")
        if is_new:
            self.line.start_clock()
        if (steps := newest["step"] - self.step) > 0:  # fewer: a killed training does some of them again
            self.report(newest, steps)
            self.step = newest["step"]
        return int(self.step)

    def _newest(self) -> dict[str, Any] | None:
        lines = list(documents.newest_lines(self.path, 65536))
        newest = documents.parse(lines[-1]) if lines and lines[-1].endswith(b"}") else None
        return newest if isinstance(newest, dict) and isinstance(newest.get("step"), int) else None


def check_features(out: StoragePath, *trains: TrainConfig) -> None:
    """Refuse features that would be kept in a run folder on a store: they are mapped into memory."""
    if isinstance(out, RemotePath) and any(train.features is True for train in trains):
        raise RecipeError(
            f"features is true, which keeps them in the run folder, and {out} is on a store: give `features` a folder"
            " that all workers see, or set it to false."
        )


def check_sources(initial: InitialConfig, architecture: Architecture) -> None:
    """Refuse checkpoints that are not there, and a language model that is not the one described, at once."""
    for source in (initial.vision, initial.text):
        if source is not None:
            files.refuse_missing(source)
    if initial.language is not None:
        architecture.check_language(initial.language)


def check_pictures(sources: Iterable[Source], train: TrainConfig) -> None:
    """Refuse files of texts as the data of a training that reads pictures."""
    urls = (url for source in sources for url in source.shards)
    if train.objectives.reads_images and (alone := next(filter(shards.is_lines, urls), None)) is not None:
        raise RecipeError(
            f"data: {alone} holds texts without pictures, and these objectives read pictures; give shards, or train on"
            " texts alone (objectives.task=vlmo-texts)."
        )


def check_beginning(
    architecture: Architecture, initial: InitialConfig, start: StoragePath | None, name: str, key: str = ""
) -> None:
    """Refuse a language model that is given but not used, and one that nobody names; `key` is where `initial` stands,
    with its dot."""
    has_language = architecture.language_kind is not None
    if initial.language and not has_language:
        raise RecipeError(f"{key}initial.language is given, and {name} has no language model: leave it out.")
    if has_language and not initial.language and start is None:
        raise RecipeError(f"{name} has a frozen language model: say which it is with {key}initial.language.")


def check_start(start: StoragePath, architecture: Architecture, initial: InitialConfig, key: str = "") -> StoragePath:
    """Refuse a start of another shape than `model`, which would be trained in its place without a word, and one without
    the language model that nobody else names; `key` is where `start` stands, with its dot."""
    path = store.find(str(start))
    saved, wanted = store.architecture(path), architecture
    if saved.family != architecture.family and architecture.starts_from is not None:
        architecture = architecture.starts_from
    if saved.family != architecture.family:
        base, what = ("", "model") if architecture is wanted else (f" on a base of {architecture.family}", "model.base")
        raise RecipeError(
            f"{key}start: {path} is of the family {saved.family}, and `{key}model` of {wanted.family}{base}: set "
            f"{key}{what} to an architecture of {saved.family}, or start from a model of {architecture.family}."
        )
    theirs, ours = saved.starts_from, wanted.starts_from
    if theirs and ours and saved.family == wanted.family:
        for what, there, here in (
            ("base", theirs.family, ours.family),
            ("images", saved.pictures_of_text, wanted.pictures_of_text),
        ):
            if there != here:
                raise RecipeError(
                    f"{key}start: {path} is a {saved.family} with {what} {there}, and `{key}model` has {what} {here}; "
                    "start from the base's own model, which was not fine-tuned for another task."
                )
    check_shape(saved, architecture, f"{key}start: {path}", f"`{key}model`", ("vision", "text"))
    if preprocess_for(path, saved) != models.preprocess_of(saved):
        raise RecipeError(
            f"{key}start: {path} wants its pictures otherwise than the family {saved.family} (its"
            " preprocessor_config.json: mean, std, size), and trainings give them as the family does; start from one"
            " that wants them so."
        )
    if architecture.language_kind and not saved.language_kind and initial.language is None:
        raise RecipeError(
            f"{key}start: {path} has no language model, and `model` has: say which with {key}initial.language."
        )
    return path


def check_shape(
    saved: Architecture, wanted: Architecture, there: str, here: str, towers: Sequence[str] = ("vision",)
) -> None:
    """Refuse a model whose towers are not shaped as those that are to begin with them."""
    for tower in towers:
        for name, ours in wanted.towers.get(tower, {}).items():
            theirs = saved.towers.get(tower, {}).get(name)
            if theirs != ours:
                raise RecipeError(
                    f"{there} has {tower}.{name} {theirs}, and {here} {ours}; give the architecture that it has."
                )
