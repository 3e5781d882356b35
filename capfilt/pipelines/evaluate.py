"""evaluate: figures of a model on held-out shards, and of a filter where the truth of web texts is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from capfilt.cluster.session import Session
from capfilt.cluster.spread import Resources
from capfilt.config import Config
from capfilt.data import annotations, shards
from capfilt.data.tokens import Tokenizer
from capfilt.engine.device import pick_device
from capfilt.engine.filter import Filter
from capfilt.errors import RecipeError
from capfilt.evaluation import matching
from capfilt.evaluation.examine import EvaluateConfig, calibrate, caption, look, retrieve, roles, truths
from capfilt.models import weights
from capfilt.pipelines.stage import run_stage
from capfilt.reports.ledger import Ledger, fingerprint, write_json
from capfilt.reports.progress import Progress
from capfilt.reports.tally import Tally


class EvaluateJob(Config):
    """One model before one held-out set; its outcome is `out/metrics.json`."""

    out: Path
    model: Path
    shards: tuple[str, ...]
    config: EvaluateConfig

    @property
    def name(self) -> str:
        """The stage."""
        return "evaluate"

    def identity(self, item: str) -> str:
        """The model's weights, the held-out shards and the settings."""
        return fingerprint(
            item, weights.fingerprint(self.model), _inputs(self.shards), self.config.model_dump(mode="json")
        )

    def open(self) -> Callable[[str], str]:
        """Load the model."""
        device = pick_device()
        model = weights.load(self.model).eval().to(device)
        judge, writer = roles(model, Tokenizer.load(self.model), self.config)

        def work(item: str) -> str:
            with torch.inference_mode():
                held = look(model, self.shards, self.config.batch_size, device)
                figures: dict[str, Any] = {}
                if judge is not None:
                    figures["retrieval"] = retrieve(judge, held, self.config)
                if writer is not None:
                    figures["captioning"] = caption(writer, held, self.config.batch_size)
            path = self.out / "metrics.json"
            write_json(path, figures)
            Ledger(self.out, self.name).commit(item, self.identity(item), [path], Tally.zero())
            return ""

        return work


class CalibrateJob(Config):
    """A filter before human validation pairs; its outcome is `out/calibration.json`."""

    out: Path
    model: Path
    shards: tuple[str, ...]
    score: str
    recall: float
    batch_size: int

    @property
    def name(self) -> str:
        """The stage."""
        return "calibrate"

    def identity(self, item: str) -> str:
        """The filter's weights, the validation shards, the score and the recall."""
        return fingerprint(item, weights.fingerprint(self.model), _inputs(self.shards), self.score, self.recall)

    def open(self) -> Callable[[str], str]:
        """Load the filter."""
        device = pick_device()
        model = weights.load(self.model).eval().to(device)
        judge = Filter(model, Tokenizer.load(self.model))

        def work(item: str) -> str:
            held = look(model, self.shards, self.batch_size, device)
            found = calibrate(judge, held, self.score, self.recall, self.batch_size)
            path = self.out / "calibration.json"
            write_json(
                path,
                {
                    "score": self.score,
                    "threshold": found.threshold,
                    "recall": found.recall,
                    "false_positive_rate": found.false_positive_rate,
                    "auc": found.auc,
                },
            )
            Ledger(self.out, self.name).commit(item, self.identity(item), [path], Tally.zero())
            return f"{self.score} >= {found.threshold:.3f}"

        return work


def _inputs(urls: Sequence[str]) -> list[dict[str, Any]]:
    stats = [shards.stat(url) for url in urls]
    return [{key: value for key, value in stat.items() if key != "version"} for stat in stats]


def evaluate(
    session: Session, job: EvaluateJob, resources: Resources, show: Progress, label: str = "evaluate"
) -> None:
    """Examine a model; the figures are in `job.out/metrics.json`."""
    if not weights.architecture(job.model).text.roles:
        raise RecipeError(f"{job.model} can neither judge nor write; there is nothing to evaluate")
    run_stage(session, job, {"metrics": "metrics"}, resources, show, label)


def filter_figures(urls: Sequence[str], folder: Path, score: str, threshold: float) -> dict[str, Any]:
    """How well the filter's scores tell right web texts from wrong ones, by kind; {} where no truth is known."""
    known = {uid: (matches, kind) for uid, matches, kind in truths(urls)}
    if not known:
        return {}
    scores, matches, kinds = [], [], []
    for url in urls:
        table = annotations.read(folder / f"{shards.name(url)}.parquet")
        for row in annotations.rows(table):
            value = row.itm if score == "itm" else row.itc
            if row.source == "web" and row.status == "ok" and value is not None and row.uid in known:
                scores.append(value)
                matches.append(known[row.uid][0])
                kinds.append(known[row.uid][1])
    return dict(matching.report(np.array(scores), np.array(matches), kinds, threshold))
