"""The verbs that look into a run folder: how far it is, whether it holds, what became of an image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from capfilt.api import inspection
from capfilt.cli.execute import Terminated, execute
from capfilt.cli.options import Debug, Json
from capfilt.cli.tables import print_status, print_verified, watch_status
from capfilt.cli.terminal import say, say_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from capfilt.runs.progress import Progress

FetchInputs = Annotated[
    bool,
    typer.Option("--fetch-inputs", help="Fetch shards that the run's plan names from elsewhere, too: do you trust it?"),
]
RunFolder = Annotated[str, typer.Argument(help="A run folder: what was an --out.")]


def status(
    run: RunFolder,
    watch: Annotated[bool, typer.Option("--watch", help="Look again until the run ends; Ctrl-C leaves it.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks of --watch.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; with --watch, a line for each look.")] = False,
    debug: Debug = False,
) -> None:
    """How far a run is: per stage what is done, the rate, the time left, failures by reason. Needs no Ray.

    Example: `capfilt status runs/demo --watch`
    """

    def work(_show: Progress) -> Any:
        if watch:
            return watched(seen.record for seen in inspection.watch(run, every))
        told = inspection.status(run).record
        if not as_json:
            print_status(told)
        return told

    def watched(looks: Iterator[dict[str, Any]]) -> None:
        try:
            watch_status(looks, as_json)
        except Terminated:
            raise
        except KeyboardInterrupt:  # how one leaves, and nothing was interrupted
            return

    execute(work, as_json and not watch, debug, show_result=False)


def verify(
    run: RunFolder,
    mend: Annotated[
        bool, typer.Option("--mend", help="Withdraw what does not hold: the command that made it does it again.")
    ] = False,
    inputs: Annotated[
        bool, typer.Option("--inputs", help="Read the input shards again, too, and compare them with what was read.")
    ] = False,
    fetch_inputs: FetchInputs = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Read again and hash everything that a run committed, check the balance, and name what does not hold.

    Leaves with 1 where something does not hold, unless `--mend` withdrew it, and where an input has changed.

    Example: `capfilt verify runs/demo --mend`
    """
    broken: list[Any] = []

    def work(show: Progress) -> Any:
        found = inspection.verify(run, mend=mend, inputs=inputs, fetch_inputs=fetch_inputs, on_progress=show)
        broken.extend(() if mend else found.broken)
        broken.extend(found.changed_inputs)
        if not as_json:
            print_verified(found.record)
        return found.record

    execute(work, as_json, debug, show_result=False)
    if broken:
        raise typer.Exit(1)


def explain(
    run: RunFolder,
    image: Annotated[str, typer.Argument(help="The key, the uid or the sha256 of an image.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What happened to one image: every text, its scores, which model wrote and judged it, the verdict and why.

    Example: `capfilt explain runs/demo 000000012`
    """

    def work(_show: Progress) -> Any:
        found = inspection.explain(run, image)
        if not as_json:
            for line in found.lines():
                say(line)
        return found.record

    execute(work, as_json, debug, show_result=False)


def report(
    run: Annotated[str, typer.Argument(help="A run folder: of a bootstrap, finished or not, or of another verb.")],
    out: Annotated[str | None, typer.Option("--out", help="The page [default: report.html in the run folder].")] = None,
    fetch_inputs: FetchInputs = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a run as one HTML page: figures, charts, a gallery, a threshold to move. It needs no network.

    Example: `capfilt report runs/demo`
    """

    def work(_show: Progress) -> Any:
        return inspection.report(run, out=out or None, fetch_inputs=fetch_inputs).record

    execute(work, as_json, debug)


def review(
    run: Annotated[str, typer.Argument(help="A run folder with annotations.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1 [default: any that is free].")] = 0,
    fetch_inputs: FetchInputs = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print two lines of JSON: the address, and in the end the result.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Serve the report with buttons, to this machine alone, and keep every click as a label in the run folder.

    What was said sets a threshold where `capfilt select` is told to calibrate on labels.

    Example: `capfilt review runs/demo`
    """

    def work(_show: Progress) -> Any:
        from capfilt.pipelines import review as pipeline
        from capfilt.storage.paths import storage_path

        def announce(url: str) -> None:
            if as_json:
                say_json({"url": url})
                return
            say(f"open {url}")
            say("Ctrl-C ends the review; every click is kept at once")

        result = pipeline.run(storage_path(run), port, announce, fetch_inputs)
        if as_json:
            say_json(result)
        return result

    execute(work, False, debug, show_result=not as_json)
