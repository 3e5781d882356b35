"""The command line: a verb is a module of `capfilt/pipelines/`.

Heavy imports are inside the verbs, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from capfilt import __version__, presets
from capfilt import config as configs
from capfilt.errors import CapfiltError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from capfilt.config import C
    from capfilt.reports.progress import Progress

app = typer.Typer(
    name="capfilt",
    help="CapFilt (BLIP, 2022): clean web image-text pairs with the model being trained, in rounds, on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

Out = Annotated[Path, typer.Option("--out", help="The run folder. The same command on the same folder resumes.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="Override a key of the recipe.")]
Address = Annotated[
    str,
    typer.Option(
        help="start: a Ray of its own; auto, HOST:PORT or ray://...: a running one; local: this process, no Ray."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


@app.callback(invoke_without_command=True)
def _capfilt(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
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
        return summary

    execute(work, as_json, debug, show_result=False)


@app.command()
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


@app.command()
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


@app.command()
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
    address: Address = "start",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Apply a policy to annotations and write the cleaned shards; no model is touched.

    Example: `capfilt select shards/ --annotations runs/a --out runs/clean --set threshold=0.5`
    """

    def work(show: Progress) -> Any:
        from capfilt.pipelines import select as story

        return story.run(address, shards, annotations, out, sets or [], (val, filter_), show)

    execute(work, as_json, debug)


@app.command()
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


@app.command()
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


@app.command()
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


def main() -> None:
    """Run the command line and leave with its exit code."""
    try:
        code = app(standalone_mode=False)
    except Exception as error:  # usage errors of the argument parser know how they are shown
        if not hasattr(error, "show"):
            raise
        error.show()
        code = getattr(error, "exit_code", 2)
    sys.exit(code or 0)


def execute(work: Callable[[Progress], Any], as_json: bool, debug: bool, show_result: bool = True) -> None:
    """Run a verb and print its result; what a person can put right becomes one line and an exit code."""
    from capfilt.reports.progress import Progress

    try:
        result = work(Progress(quiet=as_json))
    except KeyboardInterrupt:
        typer.echo("interrupted: run the same command again to go on", err=True)
        raise typer.Exit(130) from None
    except CapfiltError as error:
        if debug:
            raise
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    except OSError as error:  # a full disk, a folder that may not be written: the machine's fault, still one line
        if debug:
            raise
        typer.echo(f"error: {error}; nothing that was committed is lost, run the same command again", err=True)
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps(result, indent=1))
    elif show_result:
        for name, value in leaves(result):
            typer.echo(f"{name:<28} {value}")


def leaves(tree: dict[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """The figures of a result, by their dotted names."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", f"{value:.4f}" if isinstance(value, float) else str(value)


def read_recipe(verb: str, name: str, kind: type[C], sets: list[str]) -> C:
    """A recipe of a verb, by the name of a preset or by path."""
    return configs.read(presets.find("pipelines", name, within=verb), kind, sets)


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


def _share(entry: dict[str, Any], source: str) -> str:
    noise = entry.get("noise_ratio", {}).get(source)
    return "-" if noise is None else f"{entry['kept'].get(source, 0)} ({1 - noise:.0%})"


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
