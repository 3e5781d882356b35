"""The verbs that read run folders, recipes and models, as functions. None needs a cluster, and only `verify` with
`mend`, `explain` with `heatmap`, `report` and `export` write anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from capfilt.api import arguments
from capfilt.api.arguments import Location, Price, Settings, assignments, located, location, named
from capfilt.api.progress import OnLog, OnProgress, progress_of
from capfilt.api.results import (
    Damage,
    Explanation,
    ExportResult,
    PretrainResult,
    Recipe,
    ReportResult,
    RunStatus,
    StageStatus,
    Verification,
)
from capfilt.errors import UsageError

if TYPE_CHECKING:
    from capfilt.runs.progress import Progress


def status(run: Location, *, price: Price | None = None) -> RunStatus:
    """How far a run is, from its files alone, while it works and after it ended; and what its stages used.

    Args:
        run: the run folder.
        price: USD of a GPU-hour and of a CPU-hour, "gpu=3.0,cpu=0.05" or a mapping: also say what it costs.

    Raises:
        RunError: `run` is no run folder.
        UsageError: `price` is none.
    """
    from capfilt.pipelines.inspect import status as pipeline

    rates = arguments.price_of(price)
    return _status(run, pipeline.run(location(run), rates))


def watch(run: Location, every: float = 2.0, *, price: Price | None = None) -> Iterator[RunStatus]:
    """The status of a run every so many seconds, until nobody works on it any more; the last one is how it ended.

    Args:
        run: the run folder.
        every: seconds between two of them.
        price: as in `status`.

    Raises:
        RunError: `run` is no run folder.
        UsageError: `price` is none.
    """
    from capfilt.pipelines.inspect import status as pipeline

    rates = arguments.price_of(price)
    for record in pipeline.follow(location(run), every, rates):
        yield _status(run, record)


def verify(
    run: Location,
    *,
    mend: bool = False,
    inputs: bool = False,
    fetch_inputs: bool = False,
    on_progress: OnProgress | Progress | None = None,
    on_log: OnLog | None = None,
) -> Verification:
    """Read again and hash everything that a run committed, and check that the counts add up.

    Args:
        run: the run folder; at rest, for `mend`.
        mend: withdraw what does not hold, so that the call that made it does it again.
        inputs: read the input shards again, too, and compare them with what was read.
        fetch_inputs: also those that the run's plan names from elsewhere: do you trust it?
        on_progress: as in `annotate`; so is `on_log`.

    Raises:
        RunError: `run` is no run folder, or is in use where it is to be mended.
    """
    from capfilt.pipelines.inspect import verify as pipeline

    with arguments.driving():
        record = pipeline.run(location(run), mend, progress_of(on_progress, on_log), inputs, fetch_inputs)
    changed = record.get("inputs", {}).get("changed", [])
    return Verification(
        run=location(run),
        **{name: record[name] for name in ("shards", "files", "bytes", "undone", "withdrawn")},
        broken=tuple(Damage(**piece) for piece in record["broken"]),
        changed_inputs=tuple(Damage(folder="", **piece) for piece in changed),
        record=record,
    )


def explain(
    run: Location,
    image: str,
    *,
    heatmap: bool = False,
    out: Location | None = None,
    filter: Location | None = None,
    fetch_inputs: bool = False,
) -> Explanation:
    """What happened to one image, by its key, uid or sha256: every text, its scores, the verdict and why.

    Args:
        run: the run folder.
        image: the key, the uid or the sha256 of an image.
        heatmap: also draw for each text the patches of the image that its score by ITM rests on.
        out: the PNG of the heatmap; by default heatmap-KEY.png in the run folder.
        filter: for the heatmap, the filter that scored the texts, where the run folder neither holds nor names it.
        fetch_inputs: for the heatmap, fetch shards that the run's plan names from elsewhere, too: do you trust it?

    Raises:
        CapfiltError: RunError for what is no run folder, an image that no table of it has, or a filter that is gone;
            UsageError for a filter that has no heatmap or did not score the texts.
    """
    from capfilt.pipelines.inspect import explain as pipeline

    if not heatmap and (out is not None or filter is not None or fetch_inputs):
        raise UsageError("--out, --filter and --fetch-inputs are of the heatmap: say --heatmap too.")
    record = pipeline.run(location(run), image)
    if not heatmap:
        return Explanation(image, record["models"], record)
    from capfilt.pipelines.inspect import heatmap as drawing

    page, model = located(out), named(filter)
    drawn = drawing.run(location(run), record, page, model, fetch_inputs)
    return Explanation(image, record["models"], {**record, "heatmap": str(drawn)}, drawn)


def report(
    run: Location,
    other: Location | None = None,
    *,
    out: Location | None = None,
    fetch_inputs: bool = False,
    heatmaps: int = 0,
    filter: Location | None = None,
    price: Price | None = None,
) -> ReportResult:
    """Write a run as one HTML page, which needs no network: figures, charts, a gallery, a threshold to move.

    With `other`, both runs side by side: the images that they share, joined on uid, with both runs' scores, verdicts
    and captions. Runs that share none are compared by their totals.

    Args:
        run: the run folder, finished or not.
        other: a second run folder to compare with; both have annotations.
        out: the page; by default report.html in the run folder, or comparison.html for two runs.
        fetch_inputs: fetch shards that the run's plan names from elsewhere, too: do you trust it?
        heatmaps: draw the heatmaps of so many kept and of so many dropped texts of each round, those nearest to its
            threshold; it runs the filter that scored them.
        filter: for the heatmaps, that filter, where the run folder neither holds nor names it.
        price: as in `status`; of one run.

    Raises:
        RunError: `run` is no run folder, or one of two has no annotations; or its filter is gone.
        UsageError: a run compared with itself, heatmaps or a price of two runs, or a filter that has none.
    """
    from capfilt.pipelines.inspect import report as pipeline

    if filter is not None and not heatmaps:
        raise UsageError("--filter is of the heatmaps: say --heatmaps N too.")
    if heatmaps and other is not None:
        raise UsageError("--heatmaps are of the page of one run; leave the second run out.")
    if price is not None and other is not None:
        raise UsageError("--price is of the page of one run; leave the second run out.")
    page, rates = located(out), arguments.price_of(price)
    if other is None:
        model = named(filter)
        record = pipeline.run(location(run), page, fetch_inputs, heatmaps=heatmaps, filter_=model, price=rates)
    else:
        record = pipeline.compare(location(run), location(other), page, fetch_inputs)
    joined = record.get("joined")
    return ReportResult(location(record["report"]), record["bytes"], record["rounds"], record["texts"], joined, record)


def show(recipe: Location, *, settings: Settings = (), explain: bool = False) -> Recipe:
    """A recipe or an architecture in full, every default spelled out, after checking that its parts fit together.

    Args:
        recipe: a preset of `pipelines/` or `models/`, or a YAML.
        settings: keys of it to set otherwise.
        explain: say of each key what it means.

    Raises:
        RecipeError: a name or a key that is not there, or parts that do not fit.
        TextError: a tokenizer that cannot be used.
    """
    from capfilt import config as configs
    from capfilt import presets
    from capfilt.redact import redact_tree

    name, sets = str(recipe), assignments(settings)
    if not name.endswith((".yaml", ".yml")):
        presets.folder_of(name)
    arguments.check_syntax("", None, sets)
    from capfilt.pipelines.inspect import show as pipeline

    config = pipeline.resolved(name, sets)
    tree, notes = configs.full_tree(config), tuple(pipeline.notes(config))
    if not explain:
        return Recipe(configs.tree_to_yaml(redact_tree(tree)), tree, notes)
    from capfilt.pipelines.inspect import keys

    return Recipe(keys.explained(config), tree, notes, keys.key_tree(config))


def export(
    model: Location | PretrainResult,
    *,
    out: Location,
    form: str = "hf",
    vision: Location | None = None,
    language: Location | None = None,
) -> ExportResult:
    """Write a model as transformers' `from_pretrained` or the authors' own code reads it.

    Args:
        model: a model's folder, a .pth of BLIP or LAVIS, a name on the Hugging Face hub, or what `pretrain` returned.
        out: a new folder of this machine.
        form: hf for transformers, pth for the code of BLIP or LAVIS, capfilt as it is trained here.
        vision: the frozen tower that a .pth of LAVIS lacks: LAVIS' eva_vit_g.pth.
        language: the frozen language model that it lacks: a folder of transformers or a name on the hub.

    Raises:
        CapfiltError: UsageError for an unknown form, RunError where `out` holds something already, ModelError for
            what is no model or does not fit.
    """
    from capfilt.pipelines import export as pipeline

    name = str(model.model if isinstance(model, PretrainResult) else model)
    sources = {part: str(given) for part, given in (("vision", vision), ("language", language)) if given is not None}
    record = pipeline.run(name, form, str(out), sources)
    written = tuple(location(path) for path in record["written"])
    return ExportResult(location(record["model"]), form, written, record["left_behind"], record)


def _status(run: Location, record: dict[str, Any]) -> RunStatus:
    stages = []
    for stage in record["stages"]:
        absent = {name: stage.get(name) for name in ("per_second", "seconds_left", "usage", "cost")}
        stages.append(StageStatus(**{**stage, **absent}))
    return RunStatus(location(run), record["state"], tuple(stages), record, record.get("cost"))
