"""The verbs about a model, a recipe or this machine: evaluate, export, show, bench; and world."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from capfilt.api import commands, data, inspection
from capfilt.api.arguments import location
from capfilt.cli.execute import call, execute
from capfilt.cli.next_steps import Step, after_evaluate, after_export
from capfilt.cli.options import Cpus, Debug, Json, MinSuccess, Price, Sets, SizedAddress, Workers, preset_names, setting
from capfilt.cli.terminal import say
from capfilt.data.exports import NAMES

if TYPE_CHECKING:
    from capfilt.api.results import ExportResult
    from capfilt.runs.progress import Progress


def evaluate(
    model: Annotated[str, typer.Argument(help="A model folder.")],
    shards: Annotated[
        list[str],
        typer.Argument(
            help="Held-out pairs (retrieval, captioning), or web texts of known truth (filter), or the rows of a task."
        ),
    ],
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            help="What to measure: retrieval, captioning, classification, grounding, dialog, vqa, nlvr2 or entailment.",
        ),
    ] = None,
    results: Annotated[
        str | None, typer.Option("--results", metavar="FILE", help="Write the answers as the task's server takes them.")
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option("--classes", metavar="FILE", help="Classification: a class a line [default: beside the shards]."),
    ] = None,
    templates: Annotated[
        str | None,
        typer.Option(
            "--templates", metavar="FILE", help="Classification: a prompt with {} a line [default: beside the shards]."
        ),
    ] = None,
    sets: Annotated[list[str] | None, setting("E.g. rerank=128, threshold=0.3, decode.method=greedy.")] = None,
    out: Annotated[str | None, typer.Option("--out", help="A run folder to keep metrics.json in.")] = None,
    workers: Workers = 0,
    cpus: Cpus = None,
    address: SizedAddress = "by-size",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Evaluate a model: retrieval, captioning and filter metrics, or the figures of a task.

    Example: `capfilt evaluate runs/demo/round-2/pretrain/checkpoint runs/demo/data/test`
    """
    given = locals() | {"out": out or None}
    call(commands.evaluate, given, then=lambda _: after_evaluate(model, shards, out or None, address))


def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|DATA",
            help="A model folder, a .pth of BLIP or LAVIS, or a name on the Hugging Face hub; or the run folder of"
            " select or annotate, a round of a bootstrap, or shards.",
        ),
    ],
    out: Annotated[str, typer.Option("--out", help="A new folder on this machine; of data any run folder or its URL.")],
    form: Annotated[
        str,
        typer.Option(
            "--as",
            help="A model: hf, for transformers; pth: the names of BLIP, LAVIS or CLIP; open_clip; capfilt: as trained"
            " here. Data: webdataset, parquet, hf-dataset, coyo, laion-coco, blip-json, datacomp-npy, llava-json,"
            " open-clip-csv.",
        ),
    ] = "hf",
    vision: Annotated[
        str | None, typer.Option("--vision", help="The frozen tower that a .pth of LAVIS lacks: eva_vit_g.pth.")
    ] = None,
    language: Annotated[
        str | None, typer.Option("--language", help="The language model that it lacks: a folder or a hub name.")
    ] = None,
    samples_per_shard: Annotated[
        int,
        typer.Option(min=0, help="Of webdataset, parquet, hf-dataset: samples of a file; 0: a file for each shard."),
    ] = 0,
    image_root: Annotated[
        str | None,
        typer.Option(help="Of blip-json, open-clip-csv: what stands before the paths of pictures [default: --out]."),
    ] = None,
    fetch_inputs: Annotated[
        bool, typer.Option("--fetch-inputs", help="Read shards wherever the plan of DATA names them.")
    ] = False,
    workers: Workers = 0,
    cpus: Cpus = None,
    min_success: MinSuccess = 0,
    address: SizedAddress = "by-size",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a model for transformers or the authors' own code, or data as another tool reads them.

    Example: `capfilt export runs/demo/round-2/pretrain/checkpoint --as hf --out exported`;
    `capfilt export runs/clean --as hf-dataset --out clean-hf`
    """
    given, is_data = locals(), form in NAMES
    del given["source"]
    others, kind = (_OF_MODELS, "models") if is_data else (_OF_DATA, "data")
    if wrong := [f"--{name.replace('_', '-')}" for name in others if given.pop(name) not in (None, 0, "by-size")]:
        raise typer.BadParameter(f"{', '.join(wrong)}: of {kind} only, and --as {form} is not.")
    if is_data:
        call(data.export_data, {"data": source, **given})
    else:
        call(inspection.export, {"model": source, **given}, _say_written, _after_export)


def _after_export(record: dict[str, Any]) -> list[Step]:
    return after_export(map(location, record["written"]))


_OF_MODELS = ("vision", "language")
_OF_DATA = ("samples_per_shard", "image_root", "fetch_inputs", "workers", "cpus", "min_success", "address")
"""The options of `export` that are not of both."""


def _say_written(done: ExportResult) -> None:
    for path in done.written:
        say(path)


def show(
    recipe: Annotated[
        str,
        typer.Argument(
            help="A preset of pipelines/ or models/, or the path of such a YAML.",
            autocompletion=preset_names("bootstrap", "pretrain", "finetune", "annotate", "select", "models"),
        ),
    ],
    sets: Sets = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say of each key what it means and what it may be.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Print a recipe with all its defaults, after checking that its parts fit together.

    Example: `capfilt show demo --set seed=1`; `capfilt show blip/base`; `capfilt show bootstrap/blip --explain`
    """

    def work(_show: Progress) -> Any:
        result = inspection.show(recipe, settings=sets or (), explain=explain)
        if not as_json:
            typer.echo(result.yaml, nl=False)
        for note in result.notes:
            say(f"note: {note}", err=True)
        return result.keys if explain else result.settings

    execute(work, as_json, debug, show_result=False)


def bench(
    stage: Annotated[str, typer.Argument(help="What to measure: annotate, train or download.")] = "annotate",
    sets: Annotated[
        list[str] | None, setting("E.g. model=blip/base, captions=10, shared=true, batch_size=64.", "a=b")
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=1, max=86_400, help="How long is measured, about; loading torch comes on top.")
    ] = 30,
    price: Price = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure how fast a stage is on this machine, where its time goes and which share of the floor it reaches, on
    random models and pictures.

    Example: `capfilt bench train --set model=blip/base`; `capfilt bench annotate --price cpu=0.05`
    """

    def work(show: Progress) -> Any:
        from capfilt.api.arguments import price_of

        rates = price_of(price)
        from capfilt.pipelines.bench import bench as pipeline

        result = pipeline.run(stage, sets or [], show, rates, seconds)
        if as_json:
            return result
        return {name: part for name, part in result.items() if name not in ("setup", "runs", "versions")}

    execute(work, as_json, debug)


def world(
    splits: Annotated[
        list[str] | None,
        typer.Argument(
            help="web, human, val, test (pairs), vqa, nlvr2, entailment, grounding, dialog, classification"
            " [default: the pairs]."
        ),
    ] = None,
    out: Annotated[str, typer.Option("--out", help="A folder, or its URL; each split gets a folder in it.")] = "world",
    seed: Annotated[int, typer.Option(help="Another seed is another world.")] = 0,
    sets: Annotated[list[str] | None, setting("E.g. image_size=48, task_train=4000, noise=0.3.", "a=b")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write shards of the embedded world: pairs, or what a downstream task trains on and is measured on.

    Example: `capfilt world vqa --out shards`, which writes shards/vqa-train and shards/vqa-test
    """

    def work(show: Progress) -> Any:
        from capfilt.pipelines import world as pipeline

        return pipeline.run(splits or (), sets or (), seed, location(out), show)

    execute(work, as_json, debug)
