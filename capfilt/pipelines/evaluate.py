"""evaluate: figures of a model on held-out shards, in a run folder of their own."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

from capfilt import config as configs
from capfilt.data import shards
from capfilt.evaluation.config import EXECUTION_FIELDS, EvaluateConfig
from capfilt.evaluation.tasks import check_task
from capfilt.evaluation.tasks.config import TaskEvalConfig
from capfilt.inference.roles import check_any_role
from capfilt.models.checkpoints import store
from capfilt.runs.run import Run
from capfilt.stages.compute import ComputeRequest, decide
from capfilt.stages.count_pairs import shard_digests
from capfilt.stages.evaluate import EvaluateJob, answers_path, evaluate
from capfilt.stages.workload import Place, of_shards
from capfilt.storage import documents
from capfilt.storage.atomic import atomic
from capfilt.storage.paths import StoragePath


def run(
    place: Place,
    model: str,
    specs: Sequence[str],
    config: EvaluateConfig | TaskEvalConfig,
    results: StoragePath | None = None,
) -> dict[str, Any]:
    """The verb: put a model before held-out pairs and web texts of known truth, or before the rows of a task.

    `results` is the file of answers for the server of a task that has one.
    """
    folder, show = place.out.absolute(), place.show
    urls = shards.expand(specs)
    folder_of_model = store.find(model)
    if isinstance(config, TaskEvalConfig):
        check_task(folder_of_model, config)
        config = config.with_data(urls)
    else:
        check_any_role(folder_of_model, config.decode)
    with show.wait("reading the weights of the model"):
        identity = store.fingerprint(folder_of_model)
    settings = config.model_dump(mode="json", exclude=EXECUTION_FIELDS)
    plan = {"verb": "evaluate", **settings, "model": identity, "shards": urls}
    opened = Run.open(folder, configs.to_yaml(config), plan)
    with place.connect("evaluate", of_shards(urls)) as (session, worker):
        compute = decide(session, opened, {"evaluate": ComputeRequest(config.precision, worker)}, show)["evaluate"]
        job = EvaluateJob(
            out=folder,
            models={"metrics": folder_of_model},
            shards=tuple(urls),
            contents=shard_digests(session, urls, {}, folder, show),
            config=config,
            compute=compute,
        )
        evaluate(session, job, worker, show)
    figures: dict[str, Any] = documents.read_object(folder / "metrics.json")
    if results is not None:
        with atomic(results) as file, answers_path(folder, "metrics").open("rb") as answers:
            shutil.copyfileobj(answers, file)
    return figures
