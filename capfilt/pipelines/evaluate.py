"""evaluate: figures of a model on held-out shards, and of a filter where the truth of web texts is known."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import capfilt.data.annotations as tables
from capfilt import config as configs
from capfilt.cluster.session import Session
from capfilt.cluster.spread import Resources
from capfilt.config import Config
from capfilt.data import shards
from capfilt.data.tokens import Tokenizer
from capfilt.engine.device import pick_device
from capfilt.errors import RecipeError
from capfilt.evaluation import matching
from capfilt.evaluation.examine import EvaluateConfig, caption, look, retrieve, roles, truths
from capfilt.models import verbs, weights
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
            item,
            weights.fingerprint(self.model),
            [shards.content(url) for url in self.shards],
            self.config.model_dump(mode="json"),
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


def evaluate(session: Session, job: EvaluateJob, resources: Resources, show: Progress, label: str = "evaluate") -> None:
    """Examine a model; the figures are in `job.out/metrics.json`."""
    if not verbs(weights.architecture(job.model)) & {"decode", "fuse"}:
        raise RecipeError(f"{job.model} can neither judge nor write; there is nothing to evaluate")
    run_stage(session, job, {"metrics": "metrics"}, resources, show, label)


def filter_figures(urls: Sequence[str], folder: Path, score: str, threshold: float) -> dict[str, Any]:
    """How well the filter's scores tell right web texts from wrong ones, by kind; {} where no truth is known."""
    known = {uid: (matches, kind) for uid, matches, kind in truths(urls)}
    if not known:
        return {}
    scores, matches, kinds = [], [], []
    for url in urls:
        table = tables.read(folder / f"{shards.name(url)}.parquet")
        for row in tables.rows(table):
            value = row.itm if score == "itm" else row.itc
            if row.source == "web" and row.status == "ok" and value is not None and row.uid in known:
                scores.append(value)
                matches.append(known[row.uid][0])
                kinds.append(known[row.uid][1])
    return dict(matching.report(np.array(scores), np.array(matches), kinds, threshold))


def run(
    session: Session,
    model: Path,
    specs: Sequence[str],
    sets: Sequence[str],
    filter_: tuple[Path | None, float],
    out: Path | None,
    show: Progress,
) -> dict[str, Any]:
    """The verb: examine a model on held-out shards, and the filter whose annotations of them are given."""
    urls, config = shards.expand(specs), configs.build(EvaluateConfig, sets)
    with tempfile.TemporaryDirectory() as scratch:
        folder = (out or Path(scratch)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        job = EvaluateJob(out=folder, model=weights.find(str(model)), shards=tuple(urls), config=config)
        evaluate(session, job, Resources(), show)
        figures: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
        source, threshold = filter_
        if source is not None:
            figures["filter"] = filter_figures(urls, source / "annotations", "itm", threshold)
            write_json(folder / "metrics.json", figures)
    return figures
