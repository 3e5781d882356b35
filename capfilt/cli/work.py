"""The verbs that do the work, in the order of the story: pairs come in, are cleaned, and train a model."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from capfilt.cli.execute import execute, read_recipe
from capfilt.cli.options import Address, Debug, Json, Out, Sets

if TYPE_CHECKING:
    from capfilt.reports.progress import Progress


class Calibration(StrEnum):
    """What a threshold may be set on, beside validation pairs."""

    labels = "labels"


def bootstrap(
    recipe: Annotated[str, typer.Argument(help="A preset of pipelines/bootstrap/, or a YAML.")] = "demo",
    rounds: Annotated[
        int | None, typer.Option(min=0, help="Rounds of CapFilt after the baseline (round 0) [default: the recipe's].")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The run folder [default: runs/RECIPE]. The same command resumes it."),
    ] = None,
    sets: Sets = None,
    address: Address = "start",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Caption, filter, pretrain, in rounds: the whole of CapFilt.

    Example: `capfilt bootstrap --rounds 2`, the demo, on the embedded world;
    `capfilt bootstrap my.yaml --out runs/mine --set seed=1`.
    """

    def work(show: Progress) -> Any:
        from capfilt.pipelines import bootstrap as story

        folder = out or Path("runs") / Path(recipe).stem
        own = [] if rounds is None else [f"rounds={rounds}"]
        config = read_recipe("bootstrap", recipe, story.BootstrapConfig, [*(sets or []), *own])
        summary = story.run(address, config, folder, show)
        if not as_json:
            print_rounds(summary)
            typer.echo(f"summary     {folder / 'summary.json'}\nrun folder  {folder}")
            print_next(folder, summary)
        return summary

    execute(work, as_json, debug, show_result=False)


def pretrain(
    recipe: Annotated[str, typer.Argument(help="A preset of pipelines/pretrain/, or a YAML.")],
    out: Out,
    sets: Sets = None,
    address: Address = "start",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Pretrain one model on shards, under Ray Train.

    Example: `capfilt pretrain blip-tiny --out runs/tiny --set 'data=shards/{00000..00009}.tar'`
    """

    def work(show: Progress) -> Any:
        from capfilt.pipelines import pretrain as story

        return story.run(address, read_recipe("pretrain", recipe, story.PretrainConfig, sets or []), out, show)

    execute(work, as_json, debug)


def annotate(
    shards: Annotated[list[str], typer.Argument(help="Tars, folders, globs, braces, fsspec URLs.")],
    captioner: Annotated[Path, typer.Option(help="Model folder that writes the texts.")],
    filter_: Annotated[Path, typer.Option("--filter", help="Model folder that scores them, and the web's.")],
    out: Out,
    seed: Annotated[int, typer.Option(help="Seed of the sampled texts.")] = 0,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="a.b=c", help="E.g. captions=10, decode.top_p=0.95, batch_size=128."),
    ] = None,
    gpus: Annotated[
        float | None, typer.Option(min=0, help="GPUs of each worker [default: 1 where the cluster has any, else 0].")
    ] = None,
    address: Address = "start",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write synthetic texts for images, score them and the web's, keep everything.

    Example: `capfilt annotate shards/ --captioner CAP --filter FILT --out runs/a --set captions=10`
    """

    def work(show: Progress) -> Any:
        from capfilt.pipelines import annotate as story

        return story.run(address, shards, (captioner, filter_), out, seed, sets or [], gpus, show)

    execute(work, as_json, debug)


def select(
    shards: Annotated[list[str], typer.Argument(help="The shards that were annotated.")],
    annotations: Annotated[
        Path,
        typer.Option(help="What holds their annotations/: the --out of `capfilt annotate`, a round of a bootstrap."),
    ],
    out: Out,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="a=b", help="The policy: threshold=0.5, score=itc; threshold=keep-rate, keep_rate=0.4."
        ),
    ] = None,
    val: Annotated[str | None, typer.Option(help="Human pairs, for threshold=calibrated.")] = None,
    filter_: Annotated[Path | None, typer.Option("--filter", help="The filter, for threshold=calibrated.")] = None,
    by: Annotated[
        Calibration | None,
        typer.Option("--calibrate", help="labels: set the threshold on what people said under `capfilt review`."),
    ] = None,
    address: Address = "start",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Apply a policy to annotations and write the cleaned shards; no model is touched.

    Example: `capfilt select shards/ --annotations runs/a --out runs/clean --set threshold=0.5`
    """

    def work(show: Progress) -> Any:
        from capfilt.pipelines import select as story

        return story.run(address, shards, annotations, out, sets or [], (val, filter_), show, by is not None)

    execute(work, as_json, debug)


def print_rounds(summary: dict[str, Any]) -> None:
    """One row per round; a figure that was not measured is a dash."""
    from rich.console import Console
    from rich.table import Table

    columns = {
        "round": lambda r: str(r["round"]),
        "kept web": lambda r: _share(r, "web"),
        "kept synthetic": lambda r: _share(r, "synthetic"),
        "filter AUC": lambda r: _figure(r.get("filter", {}).get("auc"), 3),
        "precision": lambda r: _figure(r.get("filter", {}).get("precision"), 3),
        "recall": lambda r: _figure(r.get("filter", {}).get("recall"), 3),
        "TR@1": lambda r: _figure(r.get("retrieval", {}).get("tr@1"), 1),
        "IR@1": lambda r: _figure(r.get("retrieval", {}).get("ir@1"), 1),
        "CIDEr": lambda r: _figure(r.get("captioning", {}).get("cider"), 1),
        "seconds": lambda r: _figure(r["seconds"], 0),
    }
    table = Table(*columns, title="CapFilt by round")
    for entry in summary["rounds"]:
        table.add_row(*(column(entry) for column in columns.values()))
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)  # a pipe has no width to keep to


def print_next(folder: Path, summary: dict[str, Any]) -> None:
    """The page of the run, and what to do next."""
    from capfilt.pipelines import report

    typer.echo(f"report      {folder / report.PAGE}")
    for what, command in report.next_steps(folder, summary):
        typer.echo(f"\n{what}:\n  {command}")


def _share(entry: dict[str, Any], source: str) -> str:
    noise = entry.get("noise_ratio", {}).get(source)
    return "-" if noise is None else f"{entry['kept'].get(source, 0)} ({1 - noise:.0%})"


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
