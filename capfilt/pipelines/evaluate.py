"""evaluate: figures of a model on held-out shards, and of a filter where the truth of web texts is known."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import capfilt.data.annotations as tables
from capfilt import config as configs
from capfilt.cluster.session import Session, connect
from capfilt.cluster.spread import Resources
from capfilt.config import Config
from capfilt.data import shards
from capfilt.engine.captioner import check_prompt
from capfilt.engine.device import Compute
from capfilt.engine.roles import preprocess_for, tokenizer_for
from capfilt.errors import RecipeError
from capfilt.evaluation.examine import EXECUTION_FIELDS, EvaluateConfig, Judged, examine, truths
from capfilt.models import verbs, weights
from capfilt.pipelines.compute import Wanted, decide
from capfilt.pipelines.rows import contents_of
from capfilt.pipelines.stage import CommandOptions, run_stage
from capfilt.reports import documents
from capfilt.reports.ledger import Ledger, fingerprint, write_json
from capfilt.reports.places import Place
from capfilt.reports.progress import Progress
from capfilt.reports.run import Run
from capfilt.reports.tally import Tally


class EvaluateJob(Config):
    """Models before one held-out set; the outcome of each is `out/NAME.json`."""

    out: Place
    models: dict[str, Place]
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
            weights.fingerprint(self.models[item]),
            [(shards.name(url), self.contents[url]) for url in self.shards],
            self.config.model_dump(mode="json", exclude=EXECUTION_FIELDS),
            self.compute.model_dump(mode="json"),
        )

    def open(self) -> Callable[[str], str]:
        """Nothing to load: an item is a model."""
        device = self.compute.open()

        def work(item: str) -> str:
            model = weights.load(self.models[item]).eval().to(device)
            tokenizer = tokenizer_for(self.models[item], model.config)
            preprocess = preprocess_for(self.models[item], model.config)
            path = self.out / f"{item}.json"
            write_json(path, examine(model, tokenizer, self.shards, self.config, device, preprocess))
            Ledger(self.out, self.name).commit(item, self.identity(item), [path], Tally.zero())
            return ""

        return work


def evaluate(session: Session, job: EvaluateJob, resources: Resources, show: Progress, label: str = "evaluate") -> None:
    """Examine models; the figures of each are in `job.out/NAME.json`."""
    for model in job.models.values():
        check_model(model, job.config)
    run_stage(session, job, {name: name for name in job.models}, resources, show, label)


def check_model(model: Place, config: EvaluateConfig) -> None:
    """Refuse a model of which nothing can be measured, before anything is loaded."""
    architecture = weights.architecture(model)
    able = verbs(architecture)
    if not able & {"decode", "fuse"}:
        raise RecipeError(f"{model} can neither judge nor write; there is nothing to evaluate")
    tokenizer = tokenizer_for(model, architecture)
    preprocess_for(model, architecture)
    if "decode" in able:
        check_prompt(tokenizer, config.decode)


def filter_figures(named: Mapping[str, str], folder: Place, score: str, threshold: float | None) -> dict[str, Any]:
    """How well annotations of shards, given by their names, tell right web texts from wrong ones, by kind; {} where no
    truth is known.

    Without a threshold (a policy that ranks only) there is nothing to say of what it keeps.
    """
    judged = Judged()
    for name, url in named.items():
        known = truths(url)
        if not known:
            continue
        for row in tables.rows(tables.read(folder / f"{name}.parquet")):
            value = row.itm if score == "itm" else row.itc
            if row.source == "web" and row.candidate == 0 and value is not None and row.uid in known:
                judged.add(value, known[row.uid])
    if threshold is None:
        return {name: figure for name, figure in judged.figures(0.0).items() if name.startswith("auc")}
    return judged.figures(threshold)


def run(
    address: str,
    model: str,
    specs: Sequence[str],
    sets: Sequence[str],
    out: Place | None,
    show: Progress,
    options: CommandOptions | None = None,
) -> dict[str, Any]:
    """The verb: put a model before held-out pairs and web texts of known truth; `out` is a run folder of its own."""
    urls, config = shards.expand(specs), configs.build(EvaluateConfig, sets)
    found = weights.find(model)
    check_model(found, config)
    with tempfile.TemporaryDirectory() as scratch:
        folder = (out or Path(scratch, "run")).absolute()
        asked = config.model_dump(mode="json", exclude=EXECUTION_FIELDS)
        plan = {"verb": "evaluate", **asked, "model": weights.fingerprint(found), "shards": urls}
        opened = Run.open(folder, configs.to_yaml(config), plan)
        with connect(address) as session:
            worker = (options or CommandOptions(gpus=None)).resources(session)
            compute = decide(session, opened, {"evaluate": Wanted("fp32", worker)}, show)["evaluate"]
            job = EvaluateJob(
                out=folder,
                models={"metrics": found},
                shards=tuple(urls),
                contents=contents_of(session, urls, {}, folder, show),
                config=config,
                compute=compute,
            )
            evaluate(session, job, worker, show)
        figures: dict[str, Any] = documents.read_object(folder / "metrics.json")
    return figures
