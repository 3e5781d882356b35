"""The verbs of the first hour: init, estimate, doctor."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from capfilt.api import first_hour
from capfilt.cli.execute import execute
from capfilt.cli.next_steps import command, page, print_steps
from capfilt.cli.options import Address, Cpus, Debug, Json, Price, preset_names
from capfilt.cli.pipelines import Gpus, KeepRate, Score, Threshold
from capfilt.cli.tables import print_estimate
from capfilt.cli.terminal import say, say_json

if TYPE_CHECKING:
    from capfilt.runs.progress import Progress

Captioner = Annotated[str | None, typer.Option("--captioner", help="What writes the texts, as `annotate` takes it.")]
Filter = Annotated[str | None, typer.Option("--filter", help="What scores them, as `annotate` takes it.")]


def init(
    data: Annotated[list[str], typer.Argument(help="Shards, a folder of pictures, or lists of URLs.")],
    out: Annotated[str, typer.Option("--out", help="The recipe, a new YAML.")] = "capfilt.yaml",
    captioner: Captioner = None,
    filter_: Filter = None,
    human: Annotated[
        str | None, typer.Option("--human", help="Clean pairs, if there are any: then the recipe is of `bootstrap`.")
    ] = None,
    val: Annotated[str | None, typer.Option("--val", help="Clean pairs that calibrate the threshold.")] = None,
    test: Annotated[str | None, typer.Option("--test", help="Held-out pairs that measure every round.")] = None,
    keep_rate: Annotated[
        float | None, typer.Option("--keep-rate", help="The share of texts to keep [default: by a threshold].")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sample that is looked at.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace recipes that are there.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing; what is not given is left at its default.")] = False,
    address: Address = "start",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Look at your data and this machine, write a commented recipe that runs as it is, and say what to run next.

    On a terminal it asks for what is not given.

    Example: `capfilt init photos/ --out photos.yaml --captioner CAP --filter FILT`
    """
    given = {"captioner": captioner, "filter": filter_, "human": human, "val": val, "test": test}
    if sys.stdin.isatty() and sys.stdout.isatty() and not (yes or as_json):
        given, keep_rate = _asked(given, keep_rate)

    def work(show: Progress) -> Any:
        result = first_hour.init(
            data, out=out, **given, keep_rate=keep_rate, address=address, seed=seed, force=force, on_progress=show
        )
        if not as_json:
            for name, words in (*result.data["facts"].items(), ("Recipes", ", ".join(map(str, result.recipes)))):
                say(f"{name:<12} {words}")
            print_steps((step["what"], command(*step["words"])) for step in result.record["next"])
        return result.record

    execute(work, as_json, debug, show_result=False)


def _asked(given: dict[str, str | None], keep_rate: float | None) -> tuple[dict[str, str | None], float | None]:
    """The answers of a person to what was left open; an empty one leaves it open."""
    questions = {
        "captioner": "A model that writes texts: a folder or a name on the Hugging Face hub [BLIP's, public]",
        "filter": "A model that scores texts [BLIP's, public]",
        "human": "Shards of clean pairs, to train on them [none]",
    }
    answers = {name: given[name] or _prompt(question) for name, question in questions.items()}
    if answers["human"]:
        more = {"val": "Clean pairs to set the threshold on [none]", "test": "Held-out pairs, for figures [none]"}
        answers |= {name: given[name] or _prompt(question) for name, question in more.items()}
    if keep_rate is None:
        share = _prompt("The share of texts to keep, such as 0.3 [by the filter's threshold]")
        try:
            keep_rate = float(share) if share else None
        except ValueError:
            raise typer.BadParameter(f"a share is a number between 0 and 1, not {share!r}") from None
    return {**given, **answers}, keep_rate


def _prompt(question: str) -> str | None:
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
        typer.Option(help="Of select: a preset or a YAML [default: itm >= 0.5].", autocompletion=preset_names("select")),
    ] = None,
    threshold: Threshold = None,
    score: Score = None,
    keep_rate: KeepRate = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="a.b=c", help="Override a key of the recipe.")
    ] = None,
    val: Annotated[str | None, typer.Option("--val", help="Human pairs, for --threshold calibrated.")] = None,
    sample: Annotated[int, typer.Option(min=1, help="Samples to draw.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    max_shards: Annotated[int, typer.Option(min=1, help="Shards to draw from; each of them is read once.")] = 32,
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

    Example: `capfilt estimate shards/ --captioner CAP --filter FILT --sample 1000 --workers 32 --price gpu=3.0,cpu=0.05`
    """

    def work(show: Progress) -> Any:
        result = first_hour.estimate(
            data,
            out=out,
            captioner=captioner,
            filter=filter_,
            recipe=recipe,
            policy=policy,
            settings=sets or (),
            threshold=threshold,
            score=score,
            keep_rate=keep_rate,
            val=val,
            sample=sample,
            seed=seed,
            max_shards=max_shards,
            address=address,
            workers=workers,
            cpus=cpus,
            gpus=gpus,
            price=price,
            on_progress=show,
        )
        if not as_json:
            print_estimate(result.record)
        if not clicks:
            return result.record
        figures = _clicks(result, as_json)
        return {**result.record, "clicks": figures}

    steps = [("say of some texts whether they are right", command("review", f"{out}/clean")), page(f"{out}/clean", "it")]
    execute(work, as_json, debug, show_result=False, then=lambda _: steps)


def _clicks(result: first_hour.EstimateResult, as_json: bool) -> dict[str, Any]:
    """Ask a person about the sample's texts; precision and recall are of the policy's threshold."""
    from capfilt.pipelines.estimate import verb

    def announce(url: str) -> None:
        say_json({"url": url}) if as_json else say(f"open {url}")
        say(f"label {verb.CLICKS} texts in random order; Ctrl-C ends sooner, and every click is kept", err=True)

    figures = verb.clicks(result.out, 0, announce)
    if not as_json:
        for name in ("precision", "recall"):
            low, high = figures.get(f"{name}_interval", (0, 1))
            known = f"{figures[name]:.3f} ({low:.3f} to {high:.3f})" if name in figures else "not known"
            say(f"{name:<24}{known}, from {figures['labels']} labels")
    return figures


def doctor(
    folder: Annotated[str, typer.Argument(help="Where run folders will lie.")] = ".",
    address: Address = "start",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check versions, limits, disk, stores, GPUs and Ray, and say what to do; exits with 1 if something must be mended.

    Example: `capfilt doctor`, `capfilt doctor /data/runs --address auto`
    """
    broken: list[bool] = []

    def work(show: Progress) -> Any:
        result = first_hour.doctor(folder=folder, address=address, on_progress=show)
        broken.append(not result.ok)
        if not as_json:
            for check in result.checks:
                say(f"{check['state']:<8} {check['name']}: {check['found']}")
                if "do" in check:
                    say(f"{'':<8} -> {check['do']}")
        return result.record

    execute(work, as_json, debug, show_result=False)
    if any(broken):
        raise typer.Exit(1)
