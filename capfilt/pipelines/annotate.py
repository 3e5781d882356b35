"""annotate: texts and scores for every image of the shards, in a run folder of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from capfilt import config as configs
from capfilt.cluster.session import Session
from capfilt.cluster.worker_pool import Resources
from capfilt.data import duplicates, embeddings, shards
from capfilt.errors import RunError
from capfilt.inference.captioners.spec import captioner_spec
from capfilt.inference.config import EXECUTION_FIELDS, AnnotateConfig
from capfilt.inference.roles import check_filter
from capfilt.models.checkpoints import store
from capfilt.pipelines import add_score
from capfilt.runs.progress import Progress
from capfilt.runs.run import Run
from capfilt.stages.annotation.annotate import AnnotateJob, annotate
from capfilt.stages.annotation.human_pairs import HumanPairsJob, measure_human_pairs
from capfilt.stages.compute import ComputeRequest, decide
from capfilt.stages.count_pairs import shard_digests
from capfilt.stages.runner import check_success
from capfilt.stages.workload import Place
from capfilt.storage.paths import StoragePath, listing


@dataclass(frozen=True)
class Extras:
    """What a command does beside annotating."""

    val: str | None = None
    """Human pairs on which the filter is measured. They change no annotation, so they are no part of the plan, and a
    finished run is measured by the same command with them."""
    scores: Sequence[str] = ()
    """Scores beside itm and itc to compute once the annotations are there."""
    add_score: Sequence[str] = ()
    """Scores to add to what is annotated already, in place of annotating."""
    without: StoragePath | None = None
    """The run folder of a deduplication, whose copies are neither captioned nor scored."""
    keep_vectors: bool = False
    """Whether the filter's vectors of the pictures are kept. They change no annotation either."""


def run(
    place: Place,
    specs: Sequence[str],
    models: tuple[str, str],
    seed: int,
    config: AnnotateConfig,
    extras: Extras = Extras(),
) -> dict[str, Any]:
    """The verb: annotate shards with a captioner and a filter into a run folder of its own.

    ShortfallError where no image, or too few, could be annotated.
    """
    if extras.add_score:
        return add_score.run(place, specs, extras.add_score)
    out, show = place.out, place.show
    captioner, filter_ = captioner_spec(models[0]), store.find(models[1])
    captioner.check(config)
    check_filter(filter_, ["itc"] if extras.keep_vectors else [])
    beside = add_score.checked(extras.scores, show)
    urls, pairs = shards.expand(specs), None if extras.val is None else shards.expand(extras.val)
    without = extras.without
    if without is not None:
        duplicates.check_shards(without, shards.by_name(urls))
    with show.wait("reading the weights of the captioner and the filter"):
        writes, scores = captioner.fingerprint(), store.fingerprint(filter_)
    fingerprints = {"captioner_fingerprint": writes, "filter_fingerprint": scores}
    settings = {"config": config.model_dump(mode="json", exclude=EXECUTION_FIELDS), "seed": seed, "round": 0}
    if without is not None:
        settings["without"] = str(without.absolute())
    run = Run.open(out, configs.to_yaml(config), {"verb": "annotate", **fingerprints, **settings, "shards": urls})
    with show.wait("asking the captioner"):
        fingerprints["captioner_fingerprint"] = captioner.identity(run, config, show.say) or writes
    with place.connect("annotate") as (session, worker):
        job = AnnotateJob(
            out=out.absolute(),
            captioner=captioner,
            filter=filter_,
            **fingerprints,
            config=config,
            compute=decide(session, run, {"annotate": ComputeRequest(config.precision, worker)}, show)["annotate"],
            seed=seed,
            round=0,
            without=without and without.absolute(),
            keep_vectors=extras.keep_vectors,
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
    if extras.keep_vectors:
        result["embeddings"] = str(out / embeddings.FOLDER)
        _check_kept(out, shards.by_name(urls))
    check_success("annotate", tally, place.options.min_success, result)
    return result


def _check_kept(out: StoragePath, names: Iterable[str]) -> None:
    """Refuse a run of which shards were annotated before their vectors were to be kept. RunError."""
    there = listing(out / embeddings.FOLDER)
    if missing := [name for name in names if f"{name}.parquet" not in there]:
        raise RunError(
            f"{len(missing)} shards were annotated without --keep-vectors, first {missing[0]}, and are not annotated"
            " again for them: `capfilt embed SHARDS --model FILTER --out E` makes the vectors of all."
        )


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
