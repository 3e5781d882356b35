"""bootstrap: CapFilt in rounds (BLIP section 3.3). The loop reads as the paper does; each step is a stage that resumes.

Round 0 pretrains on the web as it is: the line to beat. Every later round fine-tunes a captioner and, apart from it,
a filter from the newest model (shared parameters would make the filter agree with the captioner: BLIP, Table 4), lets
them clean the same web, and pretrains a new model on what is left, for as many steps as round 0 had. What the last
round pretrains may be a BLIP-2 in its stages (`final`).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field

from capfilt import config as configs
from capfilt.cluster.session import Session, connect
from capfilt.cluster.worker_pool import Resources
from capfilt.config import Config
from capfilt.data import shards
from capfilt.data.loading.loader import Source
from capfilt.data.policy import PolicyConfig
from capfilt.errors import RecipeError
from capfilt.evaluation.evaluate import EvaluateConfig
from capfilt.inference.device import Compute
from capfilt.models import Architecture
from capfilt.models.checkpoints import store
from capfilt.models.checkpoints.initial_weights import InitialConfig
from capfilt.models.layers.bert import Role
from capfilt.pipelines import report
from capfilt.pipelines.bootstrap.blip2_stages import StageConfig, check_final, merged, pretrain_final
from capfilt.pipelines.bootstrap.data import DataConfig, gather
from capfilt.pipelines.bootstrap.plan import check_momentum, plan_of, wanted
from capfilt.reporting.collect import PAGE
from capfilt.runs.ledger import Ledger
from capfilt.runs.progress import Progress
from capfilt.runs.run import Run
from capfilt.runs.tally import Tally
from capfilt.stages.annotate import AnnotateConfig, AnnotateJob, annotate, check_same_size
from capfilt.stages.calibrate import CalibrateJob, calibrate
from capfilt.stages.compute import decide
from capfilt.stages.count_pairs import contents_of
from capfilt.stages.evaluate import EvaluateJob, evaluate, filter_figures
from capfilt.stages.prompts import check_prompts
from capfilt.stages.runner import check_success, digests
from capfilt.stages.select import SelectJob, check_selected, resolve_threshold, select
from capfilt.stages.train import (
    TrainResources,
    check_features,
    check_sources,
    check_training,
    read_architecture,
    run_training,
)
from capfilt.storage import documents
from capfilt.storage.paths import StoragePath
from capfilt.training.loop import TrainConfig, TrainJob


class ClusterConfig(Config):
    """What the stages ask of the cluster; a resumed run may ask otherwise.

    Annotations do not depend on it, but for the kind of device (docs/promises.md). A training's numbers do a little:
    ITM draws its negatives within a process, as BLIP does.
    """

    train: TrainResources = TrainResources()
    finetune: TrainResources = TrainResources()
    annotate: Resources = Resources()
    """One worker that holds captioner and filter: give it a GPU where there is one."""
    select: Resources = Resources()
    """One worker that reads and writes shards; no accelerator."""


class BootstrapConfig(Config):
    """A recipe of `capfilt bootstrap`."""

    folder: ClassVar[str] = "bootstrap"

    seed: int = 0
    rounds: int = Field(default=2, ge=0)
    data: DataConfig
    model: str
    """A preset of `models/`, or a YAML."""
    tokenizer: str = "world"
    """"world", or a folder or file with a BERT vocabulary."""
    human_repeat: int = Field(default=1, ge=1)
    """How often an epoch of pretraining walks the human pairs."""
    initial: InitialConfig = InitialConfig()
    """What the towers of a new model begin with; the paper: an ImageNet ViT and BERT (BLIP, section 4.1)."""
    start: Literal["scratch", "continue"] = "scratch"
    """What a round pretrains: a new model (the paper's choice, Table 13), or the newest one further."""
    pretrain: TrainConfig
    final: tuple[StageConfig, ...] = ()
    """What the last round pretrains in place of `model`: a BLIP-2, stage by stage. Round 0 is always `model`'s."""
    captioner: TrainConfig
    filter: TrainConfig
    annotate: AnnotateConfig = AnnotateConfig()
    select: PolicyConfig = PolicyConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    cluster: ClusterConfig = ClusterConfig()


@dataclass(frozen=True)
class Story:
    """What every step of one run needs."""

    session: Session
    config: BootstrapConfig
    architecture: Architecture
    run: Run
    show: Progress
    splits: dict[str, list[str]]
    compute: dict[str, Compute]
    """What each stage computes with."""
    final: tuple[Architecture, ...] = ()
    """Those of `config.final`."""

    def folder(self, r: int, *parts: str) -> StoragePath:
        """A place in the folder of round `r`, in full: workers may start elsewhere."""
        return self.run.round(r).absolute().joinpath(*parts)

    def made(self, r: int) -> dict[str, str]:
        """The sha256 of the shards that the run made itself, those of round `r` among them."""
        came = (("data",), "world"), (("data", "web"), "download")
        known = (digests(Ledger(self.run.path(*parts), stage)) for parts, stage in came)
        return {path: sha for own in (*known, digests(Ledger(self.folder(r), "select"))) for path, sha in own.items()}

    def contents(self, r: int, urls: Sequence[str]) -> dict[str, str]:
        """The sha256 of shards that round `r` reads."""
        return contents_of(self.session, urls, self.made(r), self.run.folder.absolute(), self.show)

    def seed(self, r: int, purpose: str) -> int:
        """A seed of its own for each training: the rounds must not see the same noise."""
        name = f"{self.config.seed}|{r}|{purpose}".encode()
        return int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "big")


def run(address: str, config: BootstrapConfig, out: StoragePath, show: Progress) -> dict[str, Any]:
    """The verb: what can be refused is refused before any cluster is asked."""
    check_features(out, config.pretrain, config.captioner, config.filter, *(stage.train for stage in config.final))
    open_run(config, out)
    with connect(address) as session:
        return bootstrap(session, config, out, show)


def bootstrap(session: Session, config: BootstrapConfig, out: StoragePath, show: Progress) -> dict[str, Any]:
    """Run all rounds, from wherever they are; returns what `summary.json` says."""
    architecture, final, folder = open_run(config, out)
    compute = decide(session, folder, wanted(config), show)
    folder.log("begin", rounds=config.rounds)
    with timed(folder, show):
        data = out.absolute() / "data"
        splits = gather(session, config.data, config.seed, data, config.cluster.select, show)
    story = Story(session, config, architecture, folder, show, splits, compute, final)
    rounds = [round_zero(story)]
    newest = story.folder(0, "pretrain", "checkpoint")
    for r in range(1, config.rounds + 1):
        rounds.append(round_of_capfilt(story, r, newest))
        newest = story.folder(r, "pretrain", "checkpoint")
    seconds = spent(folder, (None, *range(config.rounds + 1)))
    summary = {"command": "bootstrap", "recipe": "recipe.yaml", "seconds": seconds, "rounds": rounds}
    if not folder.path("summary.json").is_file() or documents.read_json(folder.path("summary.json")) != summary:
        folder.write_summary(summary)
    folder.log("end", seconds=seconds)
    if show.worked or not folder.path(PAGE).is_file():  # a rerun of what is done touches nothing
        report.run(out, web=splits["web"])
    return summary


def round_zero(story: Story) -> dict[str, Any]:
    """The baseline: a model of the web as it is, with the human pairs."""
    with timed(story.run, story.show, 0):
        models = pretrain_round(story, 0, [Source(shards=tuple(story.splits["web"]))], newest=None)
        measured = evaluate_round(story, 0, models)
    return summarise(story, 0, measured)


def round_of_capfilt(story: Story, r: int, newest: StoragePath) -> dict[str, Any]:
    """Caption, filter, pretrain: one round, from the newest model to the next."""
    with timed(story.run, story.show, r):
        captioner = finetune(story, r, "captioner", newest, ("decoder",), story.config.captioner)
        judge = finetune(story, r, "filter", newest, ("encoder",), story.config.filter)
        calibrated = calibrate_filter(story, r, judge)
        annotate_web(story, r, captioner, judge)
        threshold, tally = select_web(story, r, calibrated)
        models = pretrain_round(story, r, [Source(shards=str(story.folder(r, "dataset")))], newest)
        measured = evaluate_round(story, r, models)
    score = story.config.select.score
    judged = filter_figures(shards.by_name(story.splits["web"]), story.folder(r, "annotations"), score, threshold)
    number = {} if threshold is None else {"threshold": threshold}
    return summarise(story, r, {**tally_figures(tally), "filter": {**number, **judged}, **measured})


def pretrain_round(story: Story, r: int, web: list[Source], newest: StoragePath | None) -> dict[str, StoragePath]:
    """Pretrain on these pairs and the human ones; returns the model, or in the last round the model of each stage."""
    config = story.config
    sources = (*web, Source(shards=tuple(story.splits["human"]), repeat=config.human_repeat))
    if config.final and newest is not None and r == config.rounds:
        return pretrain_final(story, r, sources, newest)
    job = TrainJob(
        out=story.folder(r, "pretrain"),
        architecture=story.architecture,
        start=newest if config.start == "continue" else None,
        tokenizer=config.tokenizer,
        sources=sources,
        train=config.pretrain,
        compute=story.compute["pretrain"],
        seed=story.seed(r, "pretrain"),
    )
    if job.start is None:
        job = job.model_copy(update={"initial": config.initial.located()})
    label, counts = f"round {r} pretrain", story.run.folder.absolute()
    model = run_training(story.session, job, config.cluster.train, story.show, label, story.made(r), counts)
    return {"pretrain": model}


def evaluate_round(story: Story, r: int, models: dict[str, StoragePath]) -> dict[str, Any]:
    """Examine what a round pretrained on the held-out pairs; no figures without such."""
    alone, stages = models.keys() == {"pretrain"}, [stage.model for stage in story.config.final]
    if "test" not in story.splits:
        return {} if alone else merged({name: {} for name in models}, stages)
    files = {name: "metrics" if alone else f"metrics-{name}" for name in models}
    job = EvaluateJob(
        out=story.folder(r),
        models={files[name]: model for name, model in models.items()},
        shards=tuple(story.splits["test"]),
        contents=story.contents(r, story.splits["test"]),
        config=story.config.evaluate,
        compute=story.compute["evaluate"],
    )
    evaluate(story.session, job, story.config.cluster.annotate, story.show, f"round {r} evaluate")
    found = {name: documents.read_object(story.folder(r, f"{file}.json")) for name, file in files.items()}
    return found["pretrain"] if alone else merged(found, stages)


def finetune(
    story: Story,
    r: int,
    role: Literal["captioner", "filter"],
    newest: StoragePath,
    parts: tuple[Role, ...],
    train: TrainConfig,
) -> StoragePath:
    """Fine-tune the newest model for one role on the human pairs; parts that the role does not use are left behind."""
    text = story.architecture.text.model_copy(update={"roles": parts})
    size = train.image_size or story.architecture.vision.image_size
    vision = story.architecture.vision.model_copy(update={"image_size": size})
    job = TrainJob(
        out=story.folder(r, role),
        architecture=story.architecture.model_copy(update={"text": text, "vision": vision}),
        start=newest,
        tokenizer=story.config.tokenizer,
        sources=(Source(shards=tuple(story.splits["human"])),),
        train=train,
        compute=story.compute[role],
        seed=story.seed(r, role),
    )
    made = digests(Ledger(story.run.path("data"), "world"))
    label, counts = f"round {r} {role}", story.run.folder.absolute()
    return run_training(story.session, job, story.config.cluster.finetune, story.show, label, made, counts)


def calibrate_filter(story: Story, r: int, judge: StoragePath) -> float | None:
    """The threshold that the validation pairs give, when the policy asks for one."""
    policy = story.config.select
    if policy.threshold != "calibrated":
        return None
    job = CalibrateJob(
        out=story.folder(r),
        model=judge,
        shards=tuple(story.splits["val"]),
        contents=story.contents(r, story.splits["val"]),
        score=policy.score,
        recall=policy.recall,
        batch_size=story.config.annotate.batch_size,
        max_length=story.config.annotate.max_length,
        compute=story.compute["annotate"],
    )
    return calibrate(story.session, job, story.config.cluster.annotate, story.show, f"round {r} calibrate")


def annotate_web(story: Story, r: int, captioner: StoragePath, judge: StoragePath) -> None:
    """Write and score texts for the whole web."""
    job = AnnotateJob(
        out=story.folder(r),
        captioner=captioner,
        filter=judge,
        captioner_fingerprint=store.fingerprint(captioner),
        filter_fingerprint=store.fingerprint(judge),
        config=story.config.annotate,
        compute=story.compute["annotate"],
        seed=story.config.seed,
        round=r,
    )
    worker, label = story.config.cluster.annotate, f"round {r} annotate"
    check_success(label, annotate(story.session, story.splits["web"], job, worker, story.show, label))


def select_web(story: Story, r: int, calibrated: float | None) -> tuple[float | None, Tally]:
    """Drop what the filter doubts, web and synthetic texts alike; human pairs are not touched."""
    policy, folder, named = story.config.select, story.folder(r, "annotations"), shards.by_name(story.splits["web"])
    threshold = resolve_threshold(policy, folder, named, calibrated)
    job = SelectJob(out=story.folder(r), annotations=folder, rule=policy.rule(threshold), carry=policy.carry)
    label = f"round {r} select"
    tally = select(story.session, named, job, story.config.cluster.select, story.show, label)
    check_selected(label, tally, job.rule)
    return threshold, tally


def tally_figures(tally: Tally) -> dict[str, Any]:
    """A tally as `summary.json` has it; the noise ratio is the share of a source's texts that were dropped, of those in
    which there is something to read."""
    came, kept = tally.texts["in"], tally.texts["kept"]
    return {
        "samples_in": tally.samples["in"],
        "samples": {name: tally.samples[name] for name in ("kept", "dropped", "failed")},
        "kept": {source: kept[source] for source in came},
        "dropped": dict(tally.texts["dropped"]),
        "failed": dict(tally.failed),
        "noise_ratio": {source: round(1 - kept[source] / num, 4) for source, num in tally.judged().items() if num},
    }


def summarise(story: Story, r: int, figures: dict[str, Any]) -> dict[str, Any]:
    """The entry of one round, also in the log; a figure that was not measured is absent."""
    entry = {"round": r, "seconds": spent(story.run, (r,)), **figures}
    story.run.log("round", **entry)
    return entry


@contextmanager
def timed(run: Run, show: Progress, r: int | None = None) -> Iterator[None]:
    """Log how long this command worked on a round (None: on the data), also when it is interrupted there."""
    begun, before = time.monotonic(), show.worked
    try:
        yield
    finally:
        if show.worked > before:
            run.log("worked", round=r, seconds=round(time.monotonic() - begun, 1))


def spent(run: Run, rounds: tuple[int | None, ...]) -> float:
    """The seconds that all commands on this run folder worked on some rounds; a rerun of what is done adds none."""
    lines = documents.objects(run.path("log.jsonl"))
    seconds = (float(line["seconds"]) for line in lines if line["event"] == "worked" and line["round"] in rounds)
    return round(sum(seconds), 1)


def open_run(config: BootstrapConfig, out: StoragePath) -> tuple[Architecture, tuple[Architecture, ...], Run]:
    """Check the recipe and open the run folder. More rounds may be asked of the same folder, and other resources."""
    architecture, final = check(config)
    check_all_sources(config, architecture, final)
    loaders = {part: getattr(config, part).loader for part in ("pretrain", "captioner", "filter")}
    check_prompts(config.tokenizer, architecture, loaders, (config.annotate.decode, config.evaluate.decode))
    plan = plan_of(config, architecture, final)
    return architecture, final, Run.open(out, configs.to_yaml(config), plan)


def check(config: BootstrapConfig) -> tuple[Architecture, tuple[Architecture, ...]]:
    """Refuse a recipe whose parts do not meet, before anything is loaded; returns its architecture, and its stages'."""
    architecture = read_architecture(config.model, config.pretrain.image_size)
    check_training(architecture, config.pretrain, config.cluster.train, f"pretrain ({config.model})")
    roles: tuple[tuple[str, Role, TrainConfig], ...] = (
        ("captioner", "decoder", config.captioner),
        ("filter", "encoder", config.filter),
    )
    for role, part, train in roles:
        if part not in architecture.text.roles:
            raise RecipeError(
                f"{config.model} cannot be the {role}: it has no {part}"
                f" (text.roles is {', '.join(architecture.text.roles)}); take a model with both."
            )
        text = architecture.text.model_copy(update={"roles": (part,)})
        check_training(architecture.model_copy(update={"text": text}), train, config.cluster.finetune, role)
    check_momentum(config)
    own = architecture.vision.image_size
    sizes = [train.image_size or own for train in (config.captioner, config.filter)]
    check_same_size("the captioner", sizes[0], "the filter", sizes[1])
    if config.rounds and config.select.threshold == "calibrated" and not config.data.has("val"):
        raise RecipeError(
            'select.threshold is "calibrated", which needs validation pairs: give data.val,'
            " or set select.threshold to a number such as 0.5."
        )
    if config.final and not config.rounds:
        raise RecipeError("final is what the last round pretrains, and rounds is 0: set rounds to 1 or more.")
    return architecture, check_final(config.final, architecture, config.model, config.cluster.train)


def check_all_sources(config: BootstrapConfig, architecture: Architecture, final: Sequence[Architecture]) -> None:
    """Refuse checkpoints that are not there, at once: the last of them is wanted when days have passed."""
    check_sources(config.initial, architecture)
    for stage, own in zip(config.final, final, strict=True):
        language = stage.language if isinstance(stage.language, str) else None
        check_sources(InitialConfig(vision=stage.vision, text=stage.text, language=language), own)
