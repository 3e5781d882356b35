"""evaluate: figures of a model on held-out shards, and of a filter where the truth of web texts is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import capfilt.data.annotations as tables
from capfilt.cluster.session import Session
from capfilt.cluster.worker_pool import Resources
from capfilt.config import Config
from capfilt.data import shards
from capfilt.evaluation.config import EXECUTION_FIELDS, EvaluateConfig
from capfilt.evaluation.known_truth import ScoredTexts, truths
from capfilt.inference.device import Compute
from capfilt.models.checkpoints import store
from capfilt.runs.ledger import Ledger, fingerprint
from capfilt.runs.progress import Progress
from capfilt.runs.tally import Tally
from capfilt.stages.runner import run_stage
from capfilt.storage.atomic import write_json
from capfilt.storage.paths import StoragePath


class EvaluateJob(Config):
    """Models before one held-out set; the outcome of each is `out/NAME.json`."""

    loads: ClassVar[str] = "the model's figures"

    out: StoragePath
    models: dict[str, StoragePath]
    """The folder of each one by its name."""
    shards: tuple[str, ...]
    contents: dict[str, str]
    """The sha256 of each shard, by its url."""
    config: EvaluateConfig
    compute: Compute
    """Figures are taken in fp32."""

    @property
    def name(self) -> str:
        """The stage."""
        return "evaluate"

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
        from capfilt.evaluation.evaluate import examine
        from capfilt.inference.local_model import LocalModel

        device = self.compute.open()

        def work(item: str) -> str:
            local = LocalModel.load(self.models[item], device)
            path = self.out / f"{item}.json"
            write_json(path, examine(local, self.shards, self.config, device))
            Ledger(self.out, self.name).commit(item, self.identity(item), [path], Tally.zero())
            return ""

        return work


def evaluate(session: Session, job: EvaluateJob, resources: Resources, show: Progress, label: str = "evaluate") -> None:
    """Examine models that fit a role (`inference.roles`); the figures of each are in `job.out/NAME.json`."""
    run_stage(session, job, {name: name for name in job.models}, resources, show, label)


def filter_figures(
    named: Mapping[str, str], folder: StoragePath, score: str, threshold: float | None
) -> dict[str, Any]:
    """How well annotations tell right web texts from wrong ones, by kind; {} where no truth is known.

    `named` are the shards, name -> url, whose annotations `folder` has. Without a threshold (a policy that ranks only)
    the figures of what is kept are absent.
    """
    scored = ScoredTexts()
    for name, url in named.items():
        known = truths(url)
        if not known:
            continue
        for row in tables.rows(tables.read(folder / f"{name}.parquet")):
            value = row.itm if score == "itm" else row.itc
            if row.source == "web" and row.candidate == 0 and value is not None and row.uid in known:
                scored.add(value, known[row.uid])
    if threshold is None:
        return {name: figure for name, figure in scored.figures(0.0).items() if name.startswith("auc")}
    return scored.figures(threshold)
