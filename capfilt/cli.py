"""The command line: a verb is a module of `capfilt/pipelines/`. Heavy imports are inside the verbs, so that `--help`
answers at once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from capfilt import __version__
from capfilt import config as configs
from capfilt.errors import CapfiltError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from capfilt.cluster.session import Session
    from capfilt.config import Config
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
    rounds: Annotated[int | None, typer.Option(help="Rounds of CapFilt after the baseline (round 0).")] = None,
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

    def run(session: Session, show: Progress) -> Any:
        from capfilt.pipelines import bootstrap as story

        folder = out or Path("runs") / Path(recipe).stem
        config = read_recipe("bootstrap", recipe, story.BootstrapConfig, [*(sets or []), *_rounds(rounds)])
        summary = story.bootstrap(session, config, folder, show)
        if not as_json:
            print_rounds(summary)
            show.say(f"summary     {folder / 'summary.json'}\nrun folder  {folder}")
        return summary

    execute(run, address, as_json, debug)


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

    Example: `capfilt pretrain blip-tiny --out runs/tiny --set 'data=[{shards: "shards/{00000..00009}.tar"}]'`
    """

    def run(session: Session, show: Progress) -> Any:
        from capfilt.pipelines import pretrain as story

        config = read_recipe("pretrain", recipe, story.PretrainConfig, sets or [])
        return {"model": str(story.pretrain(session, config, out, show))}

    execute(run, address, as_json, debug)


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
    gpus: Annotated[float, typer.Option(help="GPUs of each worker.")] = 0,
    address: Address = "start",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write synthetic texts for images, score them and the web's, keep everything.

    Example: `capfilt annotate shards/ --captioner CAP --filter FILT --out runs/a --set captions=10`
    """

    def run(session: Session, show: Progress) -> Any:
        from capfilt.pipelines import annotate as story

        return story.run(session, shards, (captioner, filter_), out, seed, sets or [], gpus, show)

    execute(run, address, as_json, debug)


@app.command()
def select(
    shards: Annotated[list[str], typer.Argument(help="The shards that were annotated.")],
    annotations: Annotated[Path, typer.Option(help="The folder that `capfilt annotate` wrote (its --out).")],
    out: Out,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="a=b",
            help="The policy, e.g. threshold=0.5, score=itc, threshold=keep-rate keep_rate=0.4.",
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

    def run(session: Session, show: Progress) -> Any:
        from capfilt.pipelines import select as story

        return story.run(session, shards, annotations, out, sets or [], (val, filter_), show)

    execute(run, address, as_json, debug)


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="A model folder.")],
    shards: Annotated[list[str], typer.Argument(help="Held-out shards with human captions.")],
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="a.b=c", help="E.g. rerank=128, decode.method=greedy."),
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(
            help="Also judge the filter of these annotations, where SHARDS tell the truth of their web texts."
        ),
    ] = None,
    threshold: Annotated[
        float, typer.Option(help="With --annotations: the itm from which a text counts as kept.")
    ] = 0.5,
    out: Annotated[Path | None, typer.Option("--out", help="Also write metrics.json there.")] = None,
    address: Address = "start",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Retrieval, captioning and filter figures of a model.

    Example: `capfilt evaluate runs/demo/round-2/pretrain/checkpoint runs/demo/data/test`
    """

    def run(session: Session, show: Progress) -> Any:
        from capfilt.pipelines import evaluate as story

        return story.run(session, model, shards, sets or [], (annotations, threshold), out, show)

    execute(run, address, as_json, debug)


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

    def work() -> None:
        from capfilt.pipelines import export as story

        result = story.run(model, form, out)
        typer.echo(json.dumps(result, indent=1) if as_json else "\n".join(result["written"]))

    _guard(work, debug)


@app.command()
def show(
    recipe: Annotated[str, typer.Argument(help="A preset of pipelines/ or models/, or a recipe's YAML.")],
    sets: Sets = None,
    debug: Debug = False,
) -> None:
    """Print a recipe in full, every default spelled out, after checking that its parts meet.

    Example: `capfilt show demo --set seed=1`
    """
    _guard(lambda: typer.echo(resolved(recipe, sets or []), nl=False), debug)


def main() -> None:
    """Run the command line; Ctrl-C ends with 130, and the run can be resumed."""
    try:
        # Not in standalone mode the parser hands back the code of a typer.Exit instead of exiting with it.
        sys.exit(app(standalone_mode=False) or 0)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("interrupted: run the same command again to resume", err=True)
        sys.exit(130)
    except Exception as error:  # usage errors of the argument parser say themselves how they are shown
        if not hasattr(error, "format_message"):
            raise
        error.show()  # type: ignore[attr-defined]
        sys.exit(getattr(error, "exit_code", 2))


def execute(run: Callable[[Session, Progress], Any], address: str, as_json: bool, debug: bool) -> None:
    """Open the session, run a verb in it, print its result; a CapfiltError becomes one line and its exit code."""

    def work() -> None:
        from capfilt.cluster.session import connect
        from capfilt.reports.progress import Progress

        with connect(address) as session:
            result = run(session, Progress(quiet=as_json))
        if as_json:
            typer.echo(json.dumps(result, indent=1))

    _guard(work, debug)


def _guard(work: Callable[[], Any], debug: bool) -> None:
    try:
        work()
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


def read_recipe(verb: str, name: str, kind: type[Config], sets: list[str]) -> Any:
    """A recipe by name or path, checked."""
    from capfilt import presets

    return configs.read(presets.find("pipelines", name, within=verb), kind, sets)


def resolved(name: str, sets: list[str]) -> str:
    """The YAML of a recipe or an architecture with every default."""
    from capfilt import presets
    from capfilt.models import BlipConfig
    from capfilt.pipelines import bootstrap as bootstraps
    from capfilt.pipelines import pretrain as pretrains

    if name in presets.names("models"):
        return configs.to_yaml(configs.read(presets.find("models", name), BlipConfig, sets))
    if name in (known.partition("/")[2] for known in presets.names("pipelines") if known.startswith("pretrain/")):
        path = presets.find("pipelines", name, within="pretrain")
    else:
        path = presets.find("pipelines", name, within="bootstrap")
    if "rounds:" in path.read_text() or path.parent.name == "bootstrap":
        config = configs.read(path, bootstraps.BootstrapConfig, sets)
        bootstraps.check(config)
        return configs.to_yaml(config)
    pretrain_config = configs.read(path, pretrains.PretrainConfig, sets)
    pretrains.check(pretrain_config)
    return configs.to_yaml(pretrain_config)


def _rounds(rounds: int | None) -> list[str]:
    if rounds is not None and rounds < 0:
        raise UsageError(f"--rounds {rounds}: it must be 0 (the baseline alone) or more")
    return [] if rounds is None else [f"rounds={rounds}"]


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
    Console().print(table)


def _share(entry: dict[str, Any], source: str) -> str:
    noise = entry.get("noise_ratio", {}).get(source)
    return "-" if noise is None else f"{entry['kept'].get(source, 0)} ({1 - noise:.0%})"


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
