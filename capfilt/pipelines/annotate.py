"""annotate: texts and scores for every image of the shards, in a run folder of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from capfilt import config as configs
from capfilt.cluster.session import Session, connect
from capfilt.cluster.worker_pool import Resources
from capfilt.data import shards
from capfilt.inference.captioners.spec import captioner_spec
from capfilt.inference.config import EXECUTION_FIELDS, AnnotateConfig
from capfilt.inference.roles import check_filter
from capfilt.models.checkpoints import store
from capfilt.pipelines import add_score
from capfilt.runs.progress import Progress
from capfilt.runs.run import Run
from capfilt.stages.annotate import AnnotateJob, annotate
from capfilt.stages.compute import ComputeRequest, decide
from capfilt.stages.count_pairs import shard_digests
from capfilt.stages.human_pairs import HumanPairsJob, measure_human_pairs
from capfilt.stages.runner import CommandOptions, check_success
from capfilt.storage.paths import StoragePath


@dataclass(frozen=True)
class Afterwards:
    """What is done once the annotations are there."""

    val: str | None = None
    """Shards of human pairs, on which the filter is measured."""
    scores: Sequence[str] = ()
    """Scores beside itm and itc to compute."""


def run(
    address: str,
    specs: Sequence[str],
    models: tuple[str, str],
    out: StoragePath,
    seed: int,
    config: AnnotateConfig,
    options: CommandOptions,
    show: Progress,
    then: Afterwards | None = None,
) -> dict[str, Any]:
    """The verb: annotate shards with a captioner and a filter into a run folder of its own.

    What is done `then` changes no annotation, so it is no part of the plan, and is done to a finished run by the same
    command with it. ShortfallError where no image, or too few, could be annotated.
    """
    then = then or Afterwards()
    captioner, filter_ = captioner_spec(models[0]), store.find(models[1])
    captioner.check(config)
    check_filter(filter_)
    beside = add_score.checked(then.scores, show)
    urls, pairs = shards.expand(specs), None if then.val is None else shards.expand(then.val)
    with show.wait("reading the weights of the captioner and the filter"):
        writes, scores = captioner.fingerprint(), store.fingerprint(filter_)
    fingerprints = {"captioner_fingerprint": writes, "filter_fingerprint": scores}
    settings = {"config": config.model_dump(mode="json", exclude=EXECUTION_FIELDS), "seed": seed, "round": 0}
    run = Run.open(out, configs.to_yaml(config), {"verb": "annotate", **fingerprints, **settings, "shards": urls})
    with show.wait("asking the captioner"):
        fingerprints["captioner_fingerprint"] = captioner.identity(run, config, show.say) or writes
    with connect(address, show=show) as session:
        worker = options.resources(session)
        job = AnnotateJob(
            out=out.absolute(),
            captioner=captioner,
            filter=filter_,
            **fingerprints,
            config=config,
            compute=decide(session, run, {"annotate": ComputeRequest(config.precision, worker)}, show)["annotate"],
            seed=seed,
            round=0,
        )
        tally = annotate(session, urls, job, worker, show)
        figures = None if pairs is None else _measure(session, job, pairs, worker, show)
        how = (job.compute, config.batch_size)
        scored = add_score.score(session, urls, beside, job.out, how, worker, show) if beside else None
    result: dict[str, Any] = {"annotations": str(out / "annotations"), **tally.to_json()}
    if figures is not None:
        result["human_pairs"] = figures
    if scored is not None:
        result["scores"] = scored
    check_success("annotate", tally, options.min_success, result)
    return result


def _measure(session: Session, job: AnnotateJob, pairs: list[str], worker: Resources, show: Progress) -> dict[str, Any]:
    """The filter's figures on human pairs, which it scores as it scored the annotations."""
    work = HumanPairsJob(
        out=job.out,
        model=job.filter,
        shards=tuple(pairs),
        contents=shard_digests(session, pairs, {}, job.out, show),
        batch_size=job.config.batch_size,
        max_length=job.config.max_length,
        compute=job.compute,
    )
    return measure_human_pairs(session, work, worker, show)
