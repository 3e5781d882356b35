"""Further scores of annotated shards: the end of `annotate --scores`, and all of `annotate --add-score`.

Captioner, filter and annotations of a finished run are not touched; a score is no part of the run's plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from capfilt.cluster.session import Session
from capfilt.cluster.worker_pool import Resources
from capfilt.data import labels, shards
from capfilt.inference.device import Compute, choose
from capfilt.inference.scores.spec import ScoreSpec, score_specs
from capfilt.pipelines.select import check_annotations, scored_with
from capfilt.runs.ledger import Ledger
from capfilt.runs.locking import lock
from capfilt.runs.progress import Progress
from capfilt.runs.run import Run, check_format
from capfilt.runs.tally import Tally
from capfilt.stages.annotation.add_score import AddScoreJob, add_scores, check_annotated
from capfilt.stages.compute import device_kind
from capfilt.stages.workload import Place
from capfilt.storage.atomic import sweep
from capfilt.storage.paths import StoragePath

Fingerprints = list[tuple[ScoreSpec, str]]
"""Scores, each with the fingerprint of what it is computed with."""


def run(place: Place, specs: Sequence[str], scores: Sequence[str]) -> dict[str, Any]:
    """The verb with --add-score: give shards that were annotated at a place, a run folder or the round of a bootstrap,
    further scores. Returns what `annotate` returned of these shards, and by score how many texts have it."""
    out, show = place.out, place.show
    wanted = checked(scores, show)
    home = labels.run_folder_of(out)
    check_format(home, Run.load(home).plan)
    check_annotations((), out / "annotations")
    lock.acquire_once(home)
    sweep(home)
    urls = shards.expand(specs)
    batch_size, precision = scored_with(out)
    with place.connect("add-score") as (session, worker):
        compute, _ = choose(precision, device_kind(session, worker))
        result = score(session, urls, wanted, out.absolute(), (compute, batch_size), worker, show)
    named = check_annotated(out, urls, show)
    done = (one.tally for one in Ledger(out, "annotate").readable_completions() if one.shard in named)
    return {"annotations": str(out / "annotations"), **sum(done, Tally.zero()).to_json(), "scores": result}


def checked(scores: Sequence[str], show: Progress) -> Fingerprints:
    """The scores that are asked for, found and checked; weights are read, not loaded."""
    specs = score_specs(scores)
    for spec in specs:
        spec.check()
    if not specs:
        return []
    with show.wait("reading the weights of the scores"):
        return [(spec, spec.fingerprint()) for spec in specs]


def score(
    session: Session,
    urls: Sequence[str],
    wanted: Fingerprints,
    out: StoragePath,
    how: tuple[Compute, int],
    worker: Resources,
    show: Progress,
) -> dict[str, dict[str, int]]:
    """Compute scores of annotated shards; returns by score how many texts have it, and how many have none.

    `how`: the device and number format of the annotations, and the images at a time.
    """
    compute, batch_size = how
    jobs = [
        AddScoreJob(out=out, spec=spec, fingerprint=digest, compute=compute, batch_size=batch_size)
        for spec, digest in wanted
    ]
    tallies = add_scores(session, check_annotated(out, urls, show), jobs, worker, show)
    return {
        name: {"texts": sum(tally.texts["kept"].values()), "without": sum(tally.texts["dropped"].values())}
        for name, tally in tallies.items()
    }
