"""embed: hashes and vectors of every picture of the shards, in a run folder of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from capfilt import config as configs
from capfilt.data import embeddings, shards
from capfilt.inference.device import Compute
from capfilt.runs.run import Run
from capfilt.stages.compute import ComputeRequest, decide
from capfilt.stages.near.embed import EXECUTION_FIELDS, STAGE, EmbedConfig, EmbedJob, VectorModel, embed
from capfilt.stages.runner import check_success
from capfilt.stages.workload import Place, of_shards
from capfilt.storage.atomic import write_json


def run(place: Place, specs: Sequence[str], model: str | None, config: EmbedConfig) -> dict[str, Any]:
    """The verb: embed shards, with a model or by their hashes alone, into a run folder of its own.

    ShortfallError where no picture, or too few, could be read.
    """
    out, show = place.out, place.show
    found = None if model is None else VectorModel.find(model, show)
    urls = shards.expand(specs)
    made_by = None if found is None else {"kind": found.kind, "fingerprint": found.fingerprint}
    settings = {"config": config.model_dump(mode="json", exclude=EXECUTION_FIELDS), "model": made_by}
    run = Run.open(out, configs.to_yaml(config), {"verb": STAGE, **settings, "shards": urls})
    if found is not None:  # beside the plan: where a model lies is not what it is
        write_json(out / embeddings.MODEL, {"path": str(found.path), **found.model_dump(mode="json", exclude={"path"})})
    else:
        place = replace(place, options=place.options.model_copy(update={"gpus": 0}))
    with place.connect(STAGE, of_shards(urls)) as (session, worker):
        compute = Compute(device="cpu", precision="fp32")
        if found is not None:
            compute = decide(session, run, {STAGE: ComputeRequest(config.precision, worker)}, show)[STAGE]
        job = EmbedJob(out=out.absolute(), model=found, config=config, compute=compute)
        tally = embed(session, urls, job, worker, show)
    result: dict[str, Any] = {"embeddings": str(out / embeddings.FOLDER), "model": made_by}
    result |= {"samples": tally.to_json()["samples"], "failed": tally.to_json()["failed"]}
    check_success(STAGE, tally, place.options.min_success, result)
    return result
