"""The steps of a round beside the fine-tuning of roles (`roles.sources`), each a stage that resumes.

A step does nothing where the ledger has its result already.
"""

from __future__ import annotations

from typing import Any

from capfilt.cluster.session import Session
from capfilt.data import shards
from capfilt.data.policy import Pool, Resolved
from capfilt.evaluation.known_truth import says_truth
from capfilt.inference.captioners.spec import CaptionerSpec
from capfilt.models import label
from capfilt.models.checkpoints import store
from capfilt.pipelines import add_score
from capfilt.pipelines.bootstrap.context import BootstrapContext, OpenedRun
from capfilt.pipelines.bootstrap.roles.blip2_stages import merge_figures, pretrain_stages
from capfilt.runs.tally import Tally
from capfilt.stages.annotation.annotate import AnnotateJob
from capfilt.stages.annotation.annotate import annotate as run_annotate
from capfilt.stages.annotation.calibrate import CalibrateJob
from capfilt.stages.annotation.calibrate import calibrate as run_calibrate
from capfilt.stages.annotation.human_pairs import HumanPairsJob
from capfilt.stages.annotation.human_pairs import measure_human_pairs as run_human_pairs
from capfilt.stages.evaluate import EvaluateJob
from capfilt.stages.evaluate import evaluate as run_evaluate
from capfilt.stages.resolve import resolve_once
from capfilt.stages.runner import check_success
from capfilt.stages.select import SelectJob, check_selected
from capfilt.stages.select import select as run_select
from capfilt.stages.train import start_processes
from capfilt.storage import documents
from capfilt.storage.paths import StoragePath
from capfilt.training.job import TrainJob


def start_trainings(session: Session, opened: OpenedRun) -> None:
    """Start the processes of the trainings while the data are made: each of Ray Train's waits until the one before it
    has begun, and meanwhile a core would be idle. No folder of a round is there before there is data."""
    start_processes(session, opened.run.folder.absolute() / "data", opened.config.cluster.train, "trainings")


def pretrain(context: BootstrapContext, r: int, newest: StoragePath | None) -> dict[str, StoragePath]:
    """Pretrain on the web pairs that the round left and the human ones; `newest` is the model of the round before.

    Returns the folder of the model as "pretrain", or in the last round of a recipe with `final` that of each stage.
    """
    config = context.config
    sources = context.pairs(r)
    if config.final and newest is not None and r == config.rounds:
        return pretrain_stages(context, r, sources, newest)
    job = TrainJob(
        out=context.folder(r, "pretrain"),
        architecture=context.opened.architecture,
        start=newest if config.start == "continue" else None,
        tokenizer=config.tokenizer,
        sources=sources,
        train=config.pretrain,
        compute=context.compute["pretrain"],
        seed=context.seed(r, "pretrain"),
    )
    if job.start is None:
        job = job.model_copy(update={"initial": config.initial.located()})
    return {"pretrain": context.train(r, job, config.cluster.train, "pretrain")}


def evaluate(context: BootstrapContext, r: int, models: dict[str, StoragePath]) -> dict[str, Any]:
    """Evaluate what a round pretrained on the held-out pairs; no figures where there are none."""
    one_model, stages = models.keys() == {"pretrain"}, [label(stage.model) for stage in context.config.final]
    if "test" not in context.splits:
        return {} if one_model else merge_figures({name: {} for name in models}, stages)
    files = {name: "metrics" if one_model else f"metrics-{name}" for name in models}
    job = EvaluateJob(
        out=context.folder(r),
        models={files[name]: model for name, model in models.items()},
        shards=tuple(context.splits["test"]),
        contents=context.contents(r, context.splits["test"]),
        config=context.config.evaluate.whole,
        compute=context.compute["evaluate"],
    )
    run_evaluate(context.session, job, context.config.cluster.annotate, context.progress, f"round {r} evaluate")
    figures = {name: documents.read_object(context.folder(r, f"{file}.json")) for name, file in files.items()}
    return figures["pretrain"] if one_model else merge_figures(figures, stages)


def calibrate(context: BootstrapContext, r: int, filter_model: StoragePath) -> float | None:
    """The threshold that the validation pairs give; None unless the policy is calibrated."""
    policy = context.config.select
    if policy.threshold != "calibrated":
        return None
    job = CalibrateJob(
        out=context.folder(r),
        model=filter_model,
        shards=tuple(context.splits["val"]),
        contents=context.contents(r, context.splits["val"]),
        score=policy.score,
        recall=policy.recall,
        batch_size=context.config.annotate.batch_size,
        max_length=context.config.annotate.max_length,
        compute=context.compute["annotate"],
    )
    worker = context.config.cluster.annotate
    return run_calibrate(context.session, job, worker, context.progress, f"round {r} calibrate")


def measure_human_pairs(context: BootstrapContext, r: int, filter_model: StoragePath) -> dict[str, Any]:
    """The figures of a round's filter on human pairs against shuffled ones.

    {} where there are no validation pairs, where the truth of web texts is known and says more, and where a calibrated
    threshold has measured the same.
    """
    pairs, web = context.splits.get("val"), context.splits["web"]
    if not pairs or context.config.select.threshold == "calibrated" or says_truth(web[0]):
        return {}
    job = HumanPairsJob(
        out=context.folder(r),
        model=filter_model,
        shards=tuple(pairs),
        contents=context.contents(r, pairs),
        batch_size=context.config.annotate.batch_size,
        max_length=context.config.annotate.max_length,
        compute=context.compute["annotate"],
    )
    worker, label = context.config.cluster.annotate, f"round {r} human pairs"
    return {"human_pairs": run_human_pairs(context.session, job, worker, context.progress, label)}


def annotate(context: BootstrapContext, r: int, captioner: CaptionerSpec, filter_model: StoragePath) -> None:
    """Write synthetic texts for the whole web, and score them and the web's."""
    config, further = context.config.annotate.whole, context.config.annotate.scores
    job = AnnotateJob(
        out=context.folder(r),
        captioner=captioner,
        filter=filter_model,
        captioner_fingerprint=captioner.identity(context.run, config, context.progress.say) or captioner.fingerprint(),
        filter_fingerprint=store.fingerprint(filter_model),
        config=config,
        compute=context.compute["annotate"],
        seed=context.config.seed,
        round=r,
    )
    worker, label = context.config.cluster.annotate, f"round {r} annotate"
    urls, show = context.splits["web"], context.progress
    check_success(label, run_annotate(context.session, urls, job, worker, show, label))
    if further:
        wanted, how = add_score.checked(further, show), (job.compute, config.batch_size)
        add_score.score(context.session, urls, wanted, job.out, how, worker, show)


def select(context: BootstrapContext, r: int, calibrated: float | None) -> tuple[Resolved, Tally]:
    """Drop the web and synthetic texts that the policy refuses; human pairs stay as they are.

    Returns the policy with its numbers, and what became of the samples and texts.
    """
    policy, annotations = context.config.select, context.folder(r, "annotations")
    named = shards.by_name(context.splits["web"])
    worker = context.config.cluster.select
    pool = Pool(annotations, list(named), policy.sources)
    resolved = resolve_once(context.session, policy, pool, calibrated, context.folder(r), worker, context.progress)
    job = SelectJob(out=context.folder(r), annotations=annotations, rule=resolved.rule, carry=policy.carry)
    label = f"round {r} select"
    tally = run_select(context.session, named, job, worker, context.progress, label)
    check_selected(label, tally, job.rule)
    return resolved, tally
