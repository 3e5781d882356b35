"""The verb: draw, annotate, select, and say what the whole will take, keep and cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from capfilt import config as configs
from capfilt import cpus, presets
from capfilt.data import parquet, shards
from capfilt.data.policy import PolicyConfig
from capfilt.data.survey import draw
from capfilt.errors import RecipeError, UsageError
from capfilt.inference.config import AnnotateConfig
from capfilt.pipelines import annotate, select
from capfilt.pipelines.bootstrap.config import BootstrapConfig, PretrainedConfig
from capfilt.pipelines.estimate import intervals, sample
from capfilt.pipelines.estimate.intervals import Figure
from capfilt.pipelines.estimate.pace import Times
from capfilt.pipelines.estimate.sample import Verdicts
from capfilt.pipelines.inspect import report, review
from capfilt.runs.cost import HOUR, Price
from capfilt.runs.ledger import Ledger
from capfilt.runs.progress import Progress
from capfilt.runs.usage import Usage, read_usage
from capfilt.stages import workload
from capfilt.storage.atomic import write_json
from capfilt.storage.paths import StoragePath, make_folder

CLICKS = 100
"""Texts that `--clicks` asks a person about."""
MAX_SHARDS = 32
"""Shards that are read to draw from; of more, so many that are drawn."""


@dataclass(frozen=True)
class Work:
    """What is to be done with the whole."""

    specs: tuple[str, ...]
    captioner: str
    filter: str
    config: AnnotateConfig
    policy: PolicyConfig
    scores: tuple[str, ...] = ()
    val: str | None = None
    """Human pairs, where the policy's threshold is calibrated on them."""


@dataclass(frozen=True)
class Question:
    """How the sample is drawn, and of which whole is spoken."""

    size: int = 1000
    seed: int = 0
    workers: int = 0
    """Of the whole run; 0: as many as measure the sample."""
    price: Price | None = None


def of_recipe(name: str, sets: Sequence[str], models: dict[str, str | None]) -> Work:
    """What one round of a bootstrap does with its web shards; `models` stand for those that the run trains.

    Raises:
        UsageError: a role that the run trains, for which no model is given; data that is not there yet.
    """
    recipe = configs.read(presets.find("pipelines", name, within="bootstrap"), BootstrapConfig, sets)
    roles: dict[str, str] = {}
    for role, given in models.items():
        section = getattr(recipe, role)
        if given is None and not isinstance(section, PretrainedConfig):
            raise UsageError(f"{name} trains its {role}, which is not there yet: give --{role} MODEL to stand for it.")
        roles[role] = given or section.pretrained
    web, val = ((each,) if isinstance(each, str) else tuple(each or ()) for each in (recipe.data.web, recipe.data.val))
    if not web:
        what = "downloads its data" if recipe.data.download else "draws the embedded world"
        raise UsageError(f"{name} {what}; estimate its shards once they are there: capfilt estimate SHARDS.")
    scores = recipe.annotate.scores
    return Work(
        web, **roles, config=recipe.annotate.whole, policy=recipe.select, scores=scores, val="::".join(val) or None
    )


def run(
    place: workload.Place, work: Work, asked: Question, announce: Callable[[str], object] | None = None
) -> dict[str, Any]:
    """Draw a sample at a place, run both stages on it, and write `estimate.json` and the report of the sample.

    With `announce` a person is then asked about its texts. The same call goes on where one ended. ShortfallError where
    nothing of the sample could be annotated, or is kept.
    """
    if work.policy.threshold == "calibrated" and work.val is None:
        raise RecipeError(
            "the policy's threshold is calibrated on human pairs; give a recipe with data.val, or a number."
        )
    out, show, urls = place.out, place.show, shards.expand(work.specs)
    drawn_by = {"shards": len(urls), "first": urls[0], "sample": asked.size, "seed": asked.seed}
    record = sample.find(out, drawn_by)
    if record is None:
        make_folder(out)
        with show.wait(f"drawing {asked.size:,} samples from {min(MAX_SHARDS, len(urls)):,} shards"):
            drawn = draw(urls, asked.size, asked.seed, MAX_SHARDS)
        workers = 1 if place.address == "local" else max(1, int(cpus.available() / (place.options.cpus or 1)))
        record = sample.write(out, drawn, work.config.batch_size, workers, drawn_by)
    stages = _stages(place, work)
    times = {label: Times.measure(stage, label, out / f"{label}.json", show) for label, stage in stages.items()}
    answer = {**_answer(out, record, times, asked), "report": report.run(out / "clean")["report"]}
    write_json(out / "estimate.json", answer)
    return answer if announce is None else {**answer, "clicks": clicks(out, announce)}


def clicks(out: StoragePath, announce: Callable[[str], object]) -> dict[str, Any]:
    """Serve the sample's texts to a person until enough are labelled; precision and recall with their intervals."""
    return review.run(out / "clean", 0, announce, enough=CLICKS)


def _stages(place: workload.Place, work: Work) -> dict[str, Callable[[Progress], object]]:
    """Both verbs on the sample, as they will be run on the whole."""
    tars, models = [str(place.out / sample.SHARDS)], (work.captioner, work.filter)
    source = select.ThresholdSource(work.val, work.filter) if work.val else select.ThresholdSource()
    extras = annotate.Extras(scores=work.scores)
    annotated = replace(place, out=place.out / "annotated")
    clean = replace(
        place,
        address=workload.BY_SIZE if place.address == "start" else place.address,
        out=place.out / "clean",
        options=place.options.model_copy(update={"gpus": 0}),
    )
    return {
        "annotate": lambda _: annotate.run(annotated, tars, models, 0, work.config, extras),
        "select": lambda _: select.run(clean, tars, annotated.out, work.policy, source),
    }


def _answer(out: StoragePath, record: dict[str, Any], times: dict[str, Times], asked: Question) -> dict[str, Any]:
    """All figures, from the record of the draw, what the stages wrote, and how long they took."""
    rows = list(sample.verdicts(out, record))
    counts = [(count, record["sizes"][url]) for url, count in record["counts"].items()]
    spread = intervals.ratio(counts)
    samples = Figure.of(record["samples"]) if record["is_census"] else spread * (record["samples"] / spread.value)
    images = samples * (1 - len(record["failed"]) / record["drawn"])
    figures = {"samples": samples, **_shares(record, rows)}
    figures["bytes_out"] = intervals.ratio(sample.written(out, record["pieces"])) * images
    if record["bytes"] is not None:
        figures["bytes_in"] = Figure(record["bytes"])
    drawn = {"drawn": record["drawn"], "shards_read": len(counts), "shards": record["shards"], "seed": asked.seed}
    return {"drawn": drawn, **intervals.records(figures), **_costs(out, record, images, times, asked)}


def _shares(record: dict[str, Any], rows: Sequence[Verdicts]) -> dict[str, Figure | None]:
    """The keep rate of images and, by source, of texts; the share that failed."""
    census = record["is_census"]
    # Where every shard was read the sample is one of pictures; else of shards.
    clusters = [number if census else row.cluster for number, row in enumerate(rows)]

    def share(counted: Sequence[tuple[int, int]]) -> Figure | None:
        drawn = len(rows) / record["samples"] if census else 0.0
        return intervals.share([(cluster, *each) for cluster, each in zip(clusters, counted, strict=True)], drawn)

    shares = {"kept_images": share([(any(row.kept.values()), 1) for row in rows])}
    shares["failed"] = share([(row.failed, 1) for row in rows])
    for source in sorted({source for row in rows for source in row.texts}):
        kept = share([(row.kept.get(source, 0), row.texts.get(source, 0)) for row in rows])
        shares[f"kept_texts.{source}"] = kept
        shares[f"noise_ratio.{source}"] = kept and kept.falling(lambda x: 1 - x)
    return shares


def _costs(
    out: StoragePath, record: dict[str, Any], images: Figure, times: dict[str, Times], asked: Question
) -> dict[str, Any]:
    """The rates of the stages; with them the hours of the whole and, with a price, its USD."""
    workers, num = asked.workers or times["annotate"].parallel, record["shards"]
    rows = sum(parquet.num_rows(out / "annotated/annotations" / f"{name}.parquet") for name in record["pieces"])
    texts = int(rows / len(record["clusters"]) * images.value)
    alone = workload.Workload(num, texts).is_small  # `select` decides so by itself
    seconds = times["annotate"].whole(images, num, workers) + times["select"].whole(
        images, num, 1 if alone else workers
    )
    figures = {
        f"images_per_second_per_worker.{label}": each.per_image.falling(lambda x: 1 / x if x else float("inf"))
        for label, each in times.items()
    }
    answer: dict[str, Any] = {
        "workers": workers,
        "start_up_seconds": {label: round(each.startup, 1) for label, each in times.items()},
        **intervals.records({**figures, "hours": seconds * (1 / HOUR)}),
    }
    used = read_usage(Ledger(out / "annotated", "annotate"))
    if asked.price is None or used is None or not used.busy:
        return answer
    size = Usage(cpu_reserved=workers * used.cpu_busy / used.busy, gpu_reserved=workers * used.gpu_busy / used.busy)
    usd = asked.price.usd(size)
    if usd is None:
        return {**answer, "unpriced": asked.price.missing(size)}
    return {**answer, **intervals.records({"usd": seconds * usd})}
