"""The verbs that look: at a model, a recipe, a run; they change nothing that was made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from capfilt import config as configs
from capfilt.cli.execute import execute
from capfilt.cli.options import Address, Debug, Json, Sets
from capfilt.cli.tables import print_status, print_verified

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


def status(
    run: Annotated[Path, typer.Argument(help="A run folder: what was an --out.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """How far a run is: per stage what is done, the rate, the time left, failures by reason. Needs no Ray.

    Example: `capfilt status runs/demo`
    """

    def work(_show: Progress) -> Any:
        from capfilt.pipelines import status as story

        told = story.run(run)
        if not as_json:
            print_status(told)
        return told

    execute(work, as_json, debug, show_result=False)


def verify(
    run: Annotated[Path, typer.Argument(help="A run folder: what was an --out.")],
    mend: Annotated[
        bool, typer.Option("--mend", help="Withdraw what does not hold: the command that made it does it again.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Read again and hash everything that a run committed, check the balance, and name what does not hold.

    Leaves with 1 where something does not hold, unless `--mend` withdrew it.

    Example: `capfilt verify runs/demo --mend`
    """
    broken: list[Any] = []

    def work(show: Progress) -> Any:
        from capfilt.pipelines import verify as story

        told = story.run(run, mend, show)
        broken.extend(told["broken"])
        if not as_json:
            print_verified(told)
        return told

    execute(work, as_json, debug, show_result=False)
    if broken and not mend:
        raise typer.Exit(1)


def explain(
    run: Annotated[Path, typer.Argument(help="A run folder: what was an --out.")],
    image: Annotated[str, typer.Argument(help="The key, the uid or the sha256 of an image.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What happened to one image: every text, its scores, which model wrote and judged it, the verdict and why.

    Example: `capfilt explain runs/demo 000000012`
    """

    def work(_show: Progress) -> Any:
        from capfilt.pipelines import explain as story

        told = story.run(run, image)
        if not as_json:
            typer.echo("\n".join(story.story(told)))
        return told

    execute(work, as_json, debug, show_result=False)
