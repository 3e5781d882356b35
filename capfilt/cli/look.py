"""The verbs that look: at a model, a recipe, a run; they change nothing that was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from capfilt import config as configs
from capfilt.cli.execute import execute
from capfilt.cli.options import Address, Debug, Json, Sets

if TYPE_CHECKING:
    from capfilt.reports.progress import Progress


def evaluate(
    model: Annotated[Path, typer.Argument(help="A model folder.")],
    shards: Annotated[
        list[str], typer.Argument(help="Held-out pairs (retrieval, captioning), or web texts of known truth (filter).")
    ],
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="a.b=c", help="E.g. rerank=128, threshold=0.3, decode.method=greedy."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="A run folder to keep metrics.json in.")] = None,
    address: Address = "start",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Retrieval, captioning and filter figures of a model.

    Example: `capfilt evaluate runs/demo/round-2/pretrain/checkpoint runs/demo/data/test`
    """

    def work(show: Progress) -> Any:
        from capfilt.pipelines import evaluate as story

        return story.run(address, model, shards, sets or [], out, show)

    execute(work, as_json, debug)


def export(
    model: Annotated[str, typer.Argument(help="A model folder, a .pth of BLIP, or a name on the Hugging Face hub.")],
    out: Annotated[Path, typer.Option("--out", help="A new folder for it.")],
    form: Annotated[
        str, typer.Option("--as", help="hf: for transformers; pth: BLIP's own names; capfilt: as trained here.")
    ] = "hf",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a model as transformers' `from_pretrained`, or BLIP's own code, reads it.

    Example: `capfilt export runs/demo/round-2/pretrain/checkpoint --as hf --out exported`
    """

    def work(_show: Progress) -> Any:
        from capfilt.pipelines import export as story

        result = story.run(model, form, out)
        if not as_json:
            typer.echo("\n".join(result["written"]))
        return result

    execute(work, as_json, debug, show_result=False)


def report(
    run: Annotated[Path, typer.Argument(help="A run folder: of a bootstrap, finished or not, or of another verb.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="The page [default: report.html in the run folder].")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a run as one HTML page: figures, charts, a gallery, a threshold to move. It needs no network.

    Example: `capfilt report runs/demo`
    """

    def work(_show: Progress) -> Any:
        from capfilt.pipelines import report as story

        return story.run(run, out)

    execute(work, as_json, debug)


def review(
    run: Annotated[Path, typer.Argument(help="A run folder with annotations.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1 [default: any that is free].")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print two lines of JSON: the address, and in the end the result.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Serve the report with buttons, to this machine alone, and keep every click as a label in the run folder.

    Example: `capfilt review runs/demo`, then `capfilt select ... --calibrate labels`
    """

    def work(_show: Progress) -> Any:
        from capfilt.pipelines import review as story

        told = "{}" if as_json else "open {}\nCtrl-C ends the review; every click is kept at once"
        result = story.run(run, port, lambda url: typer.echo(json.dumps({"url": url}) if as_json else told.format(url)))
        if as_json:
            typer.echo(json.dumps(result))
        return result

    execute(work, False, debug, show_result=not as_json)


def show(
    recipe: Annotated[str, typer.Argument(help="A preset of pipelines/ or models/, or the path of such a YAML.")],
    sets: Sets = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Print a recipe in full, every default spelled out, after checking that its parts meet.

    Example: `capfilt show demo --set seed=1`; `capfilt show blip/base`
    """

    def work(_show: Progress) -> Any:
        from capfilt.pipelines import show as story

        config = story.resolved(recipe, sets or [])
        if not as_json:
            typer.echo(configs.to_yaml(config), nl=False)
        return config.model_dump(mode="json")

    execute(work, as_json, debug, show_result=False)
