"""The verbs of the first hour: init, estimate, doctor."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from capfilt.api import estimates
from capfilt.cli.execute import call, execute
from capfilt.cli.next_steps import command, print_steps
from capfilt.cli.options import Address, Cpus, Debug, Json, Price, Sets, preset_names
from capfilt.cli.pipelines import Gpus, KeepRate, Threshold
from capfilt.cli.tables import print_estimate
from capfilt.cli.terminal import say, say_json

if TYPE_CHECKING:
    from capfilt.runs.progress import Progress

Captioner = Annotated[str | None, typer.Option("--captioner", help="What writes the texts, as `annotate` takes it.")]
Filter = Annotated[str | None, typer.Option("--filter", help="What scores them, as `annotate` takes it.")]

QUESTIONS = {
    "captioner": "A model that writes texts, a folder or a name on the Hugging Face hub [BLIP's]",
    "filter": "A model that scores texts [BLIP's]",
    "human": "Shards of clean pairs, to train both on [none]",
    "keep_rate": "The share of texts to keep, such as 0.3 [by the filter's threshold]",
}


def init(
    data: Annotated[list[str], typer.Argument(help="Shards, a folder of pictures, or lists of URLs.")],
    out: Annotated[str, typer.Option("--out", help="The recipe, a new YAML.")] = "capfilt.yaml",
    captioner: Captioner = None,
    filter_: Filter = None,
    human: Annotated[
        str | None, typer.Option("--human", help="Clean pairs, if there are any: then the recipe is of `bootstrap`.")
    ] = None,
    val: Annotated[str | None, typer.Option("--val", help="With --human: clean pairs to set the threshold on.")] = None,
    test: Annotated[str | None, typer.Option("--test", help="With --human: held-out pairs, for figures.")] = None,
    keep_rate: Annotated[
        float | None,
        typer.Option("--keep-rate", min=0.001, max=1, help="The share of texts to keep [default: by a threshold]."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sample that is looked at.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace recipes that are there.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing.")] = False,
    address: Address = "start",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Look at your data and this machine, write a commented recipe that runs as it is, and say what to run next.

    On a terminal it asks for what is not given.

    Example: `capfilt init photos/ --out photos.yaml --captioner CAP --filter FILT`
    """
    given: dict[str, Any] = {"captioner": captioner, "filter": filter_, "human": human, "keep_rate": keep_rate}
    if sys.stdin.isatty() and sys.stdout.isatty() and not (yes or as_json):
        given |= {name: _asked(question) for name, question in QUESTIONS.items() if given[name] is None}

    def work(show: Progress) -> Any:
        from capfilt.pipelines.init import recipe

        answers = recipe.Answers(**given, val=val, test=test)
        record = recipe.run(data, Path(out), answers, address, seed, force, show)
        if not as_json:
            for name, words in (*record["facts"].items(), ("Recipes", ", ".join(record["recipes"]))):
                say(f"{name:<12}{words}")
            print_steps((step["what"], _line(*step["words"])) for step in record["next"])
        return record

    execute(work, as_json, debug, show_result=False)


def _line(program: str, *words: str) -> str:
    return command(*words) if program == "capfilt" else shlex.join((program, *words))


def _asked(question: str) -> str | None:
    """The answer of a person; an empty one leaves it open."""
    return str(typer.prompt(question, default="", show_default=False)).strip() or None


def estimate(
    data: Annotated[
        list[str],
        typer.Argument(
            help="Shards, or a recipe of bootstrap, whose web shards one round cleans.",
            autocompletion=preset_names("bootstrap"),
        ),
    ],
    out: Annotated[
        str, typer.Option("--out", help="A folder for the sample; the same command on it goes on.")
    ] = "runs/estimate",
    captioner: Captioner = None,
    filter_: Filter = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Of annotate: a preset or a YAML.", autocompletion=preset_names("annotate")),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(help="Of select: a preset or a YAML.", autocompletion=preset_names("select")),
    ] = None,
    threshold: Threshold = None,
    keep_rate: KeepRate = None,
    sets: Sets = None,
    sample: Annotated[int, typer.Option(min=1, help="Samples to draw.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    workers: Annotated[int, typer.Option(min=0, help="Workers of the whole run; 0: as many as measure here.")] = 0,
    cpus: Cpus = None,
    gpus: Gpus = None,
    price: Price = None,
    clicks: Annotated[
        bool, typer.Option("--clicks", help="Then open `review` for 100 texts: precision and recall of the policy.")
    ] = False,
    address: Address = "start",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Annotate and select a seeded sample; say what all of the data will take, keep and cost, with 95 % intervals.

    Example: `capfilt estimate shards/ --captioner CAP --filter FILT --workers 32 --price gpu=3.0,cpu=0.05`
    """

    def announce(url: str) -> None:
        say_json({"url": url}) if as_json else say(f"open {url}")
        say("label 100 texts in random order; Ctrl-C ends sooner, and every click is kept", err=True)

    given = {name: value for name, value in locals().items() if name not in ("clicks", "announce")}
    steps = [("say of some texts whether they are right", command("review", f"{out}/clean"))]
    given |= {"announce": announce} if clicks else {}
    call(estimates.estimate, given, lambda result: print_estimate(result.record), lambda _: steps)


def doctor(
    folder: Annotated[str, typer.Argument(help="Where run folders will lie.")] = ".",
    address: Address = "start",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check versions, limits, disk, stores, GPUs and Ray, and say what to do; exits with 1 if something must be mended.

    Example: `capfilt doctor /data/runs --address auto`
    """

    def work(show: Progress) -> Any:
        from capfilt.pipelines.inspect import doctor as pipeline

        record = pipeline.run(address, Path(folder), show)
        for check in () if as_json else record["checks"]:
            say(f"{check['state']:<8} {check['name']}: {check['found']}")
            if "do" in check:
                say(f"{'':<8} -> {check['do']}")
        return record

    if execute(work, as_json, debug, show_result=False)["broken"]:
        raise typer.Exit(1)
