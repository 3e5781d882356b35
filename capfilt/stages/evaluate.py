"""evaluate: figures of a model on held-out shards, and of a filter where the truth of web texts is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import SerializeAsAny

import capfilt.data.annotations as tables
from capfilt.cluster.session import Session
from capfilt.cluster.worker_pool import Resources
from capfilt.config import Config
from capfilt.data import shards
from capfilt.data.policy import Rule, with_scores
from capfilt.evaluation.config import EXECUTION_FIELDS, EvaluateConfig
from capfilt.evaluation.known_truth import ScoredTexts, truths
from capfilt.evaluation.tasks import Measured
from capfilt.evaluation.tasks.config import TaskEvalConfig
from capfilt.inference.device import Compute, autocast
from capfilt.models.checkpoints import store
from capfilt.runs.ledger import Ledger, fingerprint
from capfilt.runs.progress import Progress
from capfilt.runs.tally import Tally
from capfilt.stages.runner import run_stage
from capfilt.storage.atomic import write_json
from capfilt.storage.paths import StoragePath

if TYPE_CHECKING:
    import torch

    from capfilt.inference.local_model import LocalModel


class EvaluateJob(Config):
    """Models before one held-out set; the outcome of each is `out/NAME.json`."""

    name: ClassVar[str] = "evaluate"
    loads: ClassVar[str] = "the model's figures"

    out: StoragePath
    models: dict[str, StoragePath]
    """The folder of each one by its name."""
    shards: tuple[str, ...]
    contents: dict[str, str]
    """The sha256 of each shard, by its url."""
    config: EvaluateConfig | SerializeAsAny[TaskEvalConfig]
    """What is measured: a task, or all that the default evaluation has."""
    compute: Compute
    """What the models compute with; similarities and what is made of them are taken in fp32."""

    def identity(self, item: str) -> str:
        """The model's weights, the held-out shards and the settings."""
        return fingerprint(
            item,
            store.fingerprint(self.models[item]),
            [(shards.name(url), self.contents[url]) for url in self.shards],
            self.config.model_dump(mode="json", exclude=EXECUTION_FIELDS),
            self.compute.model_dump(mode="json"),
        )

    def open(self) -> Callable[[str], str]:
        """Nothing to load but the code: an item is a model."""
        from capfilt.inference.local_model import LocalModel

        device, dtype = self.compute.open(), self.compute.dtype

        def work(item: str) -> str:
            local = LocalModel.load(self.models[item], device, dtype)
            with autocast(device, dtype):
                measured = self._measure(local, device)
            written = [self.out / f"{item}.json"]
            write_json(written[0], measured.figures)
            if measured.write_answers is not None:
                written.append(answers_path(self.out, item))
                measured.write_answers(written[1])
            Ledger(self.out, self.name).commit(item, self.identity(item), written, Tally.zero())
            return ""

        return work

    def _measure(self, local: LocalModel, device: torch.device) -> Measured:
        if isinstance(self.config, TaskEvalConfig):
            return self.config.measure(local, self.shards, device)
        from capfilt.evaluation.evaluate import examine

        return Measured(examine(local, self.shards, self.config, device))


def answers_path(out: StoragePath, item: str) -> StoragePath:
    """The file of a model's answers, as the server of a task takes them, where the task has one."""
    return out / f"{item}_answers.json"


def evaluate(session: Session, job: EvaluateJob, resources: Resources, show: Progress, label: str = "evaluate") -> None:
    """Examine models that fit a role (`inference.roles`); the figures of each are in `job.out/NAME.json`."""
    run_stage(session, job, {name: name for name in job.models}, resources, show, label)


def filter_figures(named: Mapping[str, str], folder: StoragePath, rule: Rule) -> dict[str, Any]:
    """How well annotations tell right web texts from wrong ones, by kind; {} where no truth is known.

    `named` are the shards, name -> url, whose annotations `folder` has. Of the rule its threshold alone counts; without
    one (a policy that ranks only) the figures of what is kept are absent.
    """
    scored = ScoredTexts()
    for name, url in named.items():
        known = truths(url)
        if not known:
            continue
        for row in tables.rows(with_scores(tables.read(folder / f"{name}.parquet"), folder, name, rule)):
            value = row.score(rule.score)
            if row.source == "web" and row.candidate == 0 and value is not None and row.uid in known:
                scored.add(value, known[row.uid])
    if rule.threshold is None:
        return {name: figure for name, figure in scored.figures(0.0).items() if name.startswith("auc")}
    return scored.figures(rule.threshold)
