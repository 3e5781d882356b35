"""The verb: draw, annotate, select, and say what the whole will take, keep and cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import capfilt.data.annotations as tables
from capfilt import config as configs
from capfilt import cpus, presets
from capfilt.data import shards
from capfilt.data.policy import PolicyConfig
from capfilt.data.survey import draw
from capfilt.errors import RecipeError, UsageError
from capfilt.inference.config import AnnotateConfig
from capfilt.pipelines import annotate, report, review, select
from capfilt.pipelines.bootstrap.config import BootstrapConfig, PretrainedConfig
from capfilt.pipelines.estimate import intervals, sample
from capfilt.pipelines.estimate.intervals import Figure
from capfilt.pipelines.estimate.sample import Verdicts
from capfilt.pipelines.estimate.pace import Pace, StopWatch, Times
from capfilt.runs.cost import HOUR, Price
from capfilt.runs.ledger import Ledger
from capfilt.runs.progress import Progress
from capfilt.runs.usage import Usage, read_usage
from capfilt.stages import workload
from capfilt.stages.runner import CommandOptions
from capfilt.storage import documents
from capfilt.storage.atomic import write_json
from capfilt.storage.paths import StoragePath, make_folder

CLICKS = 100
"""Texts that `--clicks` asks a person about."""


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
    max_shards: int = 32
    workers: int = 0
    """Of the whole run; 0: as many as measured the sample."""
    price: Price | None = field(default=None, compare=False)


def of_recipe(name: str, sets: Sequence[str], captioner: str | None, filter_: str | None) -> Work:
    """What one round of a bootstrap does with its web shards.

    Raises:
        UsageError: a role that the run itself trains, for which no model is given; data that is not there yet.
    """
    recipe = configs.read(presets.find("pipelines", name, within="bootstrap"), BootstrapConfig, sets)
    roles = {"captioner": (recipe.captioner, captioner), "filter": (recipe.filter, filter_)}
    models: dict[str, str] = {}
    for role, (section, given) in roles.items():
        if given is None and not isinstance(section, PretrainedConfig):
            raise UsageError(f"{name} trains its {role}, which is not there yet: give --{role} MODEL to stand for it.")
        models[role] = given or section.pretrained  # type: ignore[union-attr]
    if recipe.data.web is None:
        what = "downloads its data" if recipe.data.download else "draws the embedded world"
        raise UsageError(f"{name} {what}; estimate its shards once they are there: capfilt estimate SHARDS.")
    web = (recipe.data.web,) if isinstance(recipe.data.web, str) else recipe.data.web
    val = recipe.data.val if isinstance(recipe.data.val, str) else "::".join(recipe.data.val or ()) or None
    return Work(web, **models, config=recipe.annotate.whole, policy=recipe.select, scores=recipe.annotate.scores, val=val)


def run(
    address: str, work: Work, asked: Question, out: StoragePath, options: CommandOptions, show: Progress
) -> dict[str, Any]:
    """Draw a sample into `out`, run both stages on it, and write `estimate.json` and the report of the sample.

    The same call goes on where one ended. ShortfallError where nothing of the sample could be annotated or is kept.
    """
    urls = shards.expand(work.specs, plain_pictures=True)
    workers = 1 if address == "local" else options.workers or max(1, int(cpus.available() / (options.cpus or 1)))
    if work.policy.threshold == "calibrated" and work.val is None:
        raise RecipeError("the policy's threshold is calibrated on human pairs: give --val SHARDS, or --threshold.")
    drawn_by = {"shards": len(urls), "first": urls[0], "sample": asked.size, "seed": asked.seed}
    record = sample.open_sample(out, drawn_by)
    if record is None:
        make_folder(out)
        with show.wait(f"drawing {asked.size:,} samples from {min(asked.max_shards, len(urls)):,} shards"):
            drawn = draw(urls, asked.size, asked.seed, asked.max_shards)
        record = sample.write_sample(out, drawn, work.config.batch_size, workers, drawn_by)
    tars, times = [str(out / sample.SHARDS)], {}
    models = (work.captioner, work.filter)
    extras = annotate.Extras(scores=work.scores)
    source = select.ThresholdSource(work.val, work.filter if work.policy.threshold == "calibrated" else None)

    def annotated(watch: Progress) -> Any:
        return annotate.run(address, tars, models, out / "annotated", 0, work.config, options, watch, extras)

    def selected(watch: Progress) -> Any:
        where = workload.BY_SIZE if address == "start" else address
        given = (work.policy, source, options.model_copy(update={"gpus": 0}), watch)
        return select.run(where, tars, out / "annotated", out / "clean", *given)

    stages: dict[str, Callable[[Progress], Any]] = {"annotate": annotated, "select": selected}
    for label, stage in stages.items():
        times[label] = _timed(out, label, stage, show)
    answer = _answer(out, record, times, asked)
    answer["report"] = report.run(out / "clean")["report"]
    write_json(out / "estimate.json", answer)
    return answer


def clicks(out: StoragePath, port: int, announce: Callable[[str], None]) -> dict[str, Any]:
    """Serve the sample's texts to a person until enough are labelled; precision and recall with their intervals."""
    return review.run(out / "clean", port, announce, enough=CLICKS)


def _timed(out: StoragePath, label: str, stage: Callable[[Progress], Any], show: Progress) -> Times:
    """Run a stage; its times, those of an earlier command where nothing was left to do."""
    watch, path = StopWatch(show, label), out / f"{label}-times.json"
    stage(watch)
    times = watch.stop()
    if times.pieces or not path.is_file():
        write_json(path, times.to_json())
        return times
    saved = documents.read_object(path)
    return Times([(one[0], one[1], one[2]) for one in saved["pieces"]], saved["parallel"], saved["took"])


def _answer(out: StoragePath, record: dict[str, Any], times: dict[str, Times], asked: Question) -> dict[str, Any]:
    """All figures, from the record of the draw, what the stages wrote, and how long they took."""
    samples, rows = _samples(record), list(sample.verdicts(out, record))
    readable = 1 - len(record["failed"]) / record["drawn"]
    images = samples.times(Figure.exact(readable))
    bytes_out = intervals.ratio(sample.written(out, record["pieces"])).times(images)
    told = {} if record["bytes"] is None else {"bytes_in": {"value": float(f"{record['bytes']:.5g}")}}
    return {
        "drawn": {name: record[name] for name in ("drawn", "shards_read", "shards")} | {"seed": asked.seed},
        **intervals.records({"samples": samples, **_shares(record, rows, samples)}),
        **_costs(out, record["shards"], images, len(record["clusters"]), times, asked),
        **told,
        **intervals.records({"bytes_out": bytes_out}),
    }


def _samples(record: dict[str, Any]) -> Figure:
    """How many samples the whole has: counted, else from the shards that were read."""
    if record["is_census"]:
        return Figure.exact(record["samples"])
    rows = [(count, record["sizes"].get(url, 1)) for url, count in record["counts"].items()]
    return Figure.of(record["samples"], intervals.ratio(rows).relative)


def _shares(record: dict[str, Any], rows: list[Verdicts], samples: Figure) -> dict[str, Figure | None]:
    """The keep rate of images and, by source, of texts; the share that failed."""
    drawn = len(rows) / samples.value if record["is_census"] else 0.0
    # Where every shard was read the sample is one of pictures; else of shards.
    clusters = [number if record["is_census"] else row.cluster for number, row in enumerate(rows)]
    sources = sorted({source for row in rows for source in row.texts})
    counted = {
        "kept_images": [(any(row.kept.values()), 1) for row in rows],
        "failed": [(row.failed, 1) for row in rows],
        **{f"kept_texts.{name}": [(row.kept.get(name, 0), row.texts.get(name, 0)) for row in rows] for name in sources},
    }
    shares = {
        name: intervals.share(((c, int(hits), of) for c, (hits, of) in zip(clusters, each, strict=True)), drawn)
        for name, each in counted.items()
    }
    noise = {f"noise_ratio.{name}": kept.rest for name in sources if (kept := shares[f"kept_texts.{name}"])}
    return shares | noise


def _costs(
    out: StoragePath, num_shards: int, images: Figure, pictures: int, times: dict[str, Times], asked: Question
) -> dict[str, Any]:
    """The rates of the stages; with them the hours of the whole and, with a price, its USD."""
    workers = asked.workers or times["annotate"].parallel
    paces = {label: Pace.of(each) for label, each in times.items()}
    rows = sum(tables.num_rows(path) for path in (out / "annotated" / "annotations").glob("*.parquet"))
    alone = workload.Workload(num_shards, int(rows / pictures * images.value)).is_small  # as `select` decides itself
    seconds = {
        "annotate": paces["annotate"].whole(images, num_shards, workers),
        "select": paces["select"].whole(images, num_shards, 1 if alone else workers),
    }
    whole = seconds["annotate"].plus(seconds["select"])
    rates = {f"images_per_second_per_worker.{name}": pace.per_image.inverse for name, pace in paces.items()}
    answer: dict[str, Any] = {
        **intervals.records({**rates, "hours": whole.times(Figure.exact(1 / HOUR))}),
        "workers": workers,
        "start_up_seconds": {name: round(pace.startup, 1) for name, pace in paces.items()},
    }
    used = read_usage(Ledger(out / "annotated", "annotate"))
    if asked.price is None or used is None or not used.busy:
        return answer
    size = Usage(cpu_reserved=workers * used.cpu_busy / used.busy, gpu_reserved=workers * used.gpu_busy / used.busy)
    usd = asked.price.usd(size)
    if usd is None:
        return answer | {"unpriced": asked.price.missing(size)}
    return answer | intervals.records({"usd": whole.times(Figure.exact(usd))})
