"""The verbs that read a run folder: status, verify, explain, report, review."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from capfilt.api import inspection
from capfilt.cli.execute import Terminated, call, execute
from capfilt.cli.options import Debug, Json, Price
from capfilt.cli.tables import print_status, print_verified, watch_status
from capfilt.cli.terminal import say, say_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from capfilt.api.results import Explanation
    from capfilt.runs.progress import Progress

FetchInputs = Annotated[
    bool,
    typer.Option(
        "--fetch-inputs",
        help="Also fetch shards that the run's plan names on other machines; only for a run that you trust.",
    ),
]
RunFolder = Annotated[str, typer.Argument(help="A run folder: the --out of another command.")]


def status(
    run: RunFolder,
    watch: Annotated[bool, typer.Option("--watch", help="Update until the run ends, or until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two updates of --watch.")] = 2,
    price: Price = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON; with --watch, one line for each update.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Show the progress of a run: per stage what is done, the rate, the time left, failures by reason, what it used.

    Needs no Ray. Example: `capfilt status runs/demo --watch`, `capfilt status runs/demo --price gpu=3.0,cpu=0.05`
    """

    def work(_show: Progress) -> Any:
        if watch:
            return watched(result.record for result in inspection.watch(run, every, price=price))
        result = inspection.status(run, price=price).record
        if not as_json:
            print_status(result)
        return result

    def watched(statuses: Iterator[dict[str, Any]]) -> None:
        try:
            watch_status(statuses, as_json)
        except Terminated:
            raise
        except KeyboardInterrupt:  # how one leaves, and nothing was interrupted
            return

    execute(work, as_json and not watch, debug, show_result=False)


def verify(
    run: RunFolder,
    mend: Annotated[
        bool, typer.Option("--mend", help="Withdraw what differs, so that the command that wrote it does it again.")
    ] = False,
    inputs: Annotated[
        bool, typer.Option("--inputs", help="Also read the input shards again and compare them with what the run read.")
    ] = False,
    fetch_inputs: FetchInputs = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Read every file that a run committed, compare it with its sha256, check the counts, and name what differs.

    Exits with 1 if something differs, unless `--mend` withdrew it, or if an input has changed.

    Example: `capfilt verify runs/demo --mend`
    """

    def work(show: Progress) -> Any:
        result = inspection.verify(run, mend=mend, inputs=inputs, fetch_inputs=fetch_inputs, on_progress=show)
        if not as_json:
            print_verified(result.record)
        return result.record

    record = execute(work, as_json, debug, show_result=False)
    if (record["broken"] and not mend) or record.get("inputs", {}).get("changed"):
        raise typer.Exit(1)


def explain(
    run: RunFolder,
    image: Annotated[str, typer.Argument(help="The key, the uid or the sha256 of an image.")],
    heatmap: Annotated[
        bool, typer.Option("--heatmap", help="Also draw, for each text, the patches that its score by ITM rests on.")
    ] = False,
    out: Annotated[
        str | None, typer.Option("--out", help="The PNG of the heatmap [default: heatmap-KEY.png in RUN].")
    ] = None,
    filter_: Annotated[
        str | None, typer.Option("--filter", help="The filter that scored the texts, where RUN does not hold it.")
    ] = None,
    fetch_inputs: FetchInputs = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what happened to one image: every text, its scores, its models, the verdict and the reason.

    Example: `capfilt explain runs/demo 000000012`, `capfilt explain runs/demo 000000012 --heatmap`
    """
    given = locals() | {"out": out or None, "filter_": filter_ or None}
    call(inspection.explain, given, _say_lines)


def _say_lines(explanation: Explanation) -> None:
    for line in explanation.lines():
        say(line)


def report(
    run: Annotated[str, typer.Argument(help="A run folder: of a bootstrap, finished or not, or of another verb.")],
    other: Annotated[str | None, typer.Argument(help="A second run folder, to put beside the first.")] = None,
    out: Annotated[
        str | None,
        typer.Option("--out", help="The page [default: report.html in RUN; comparison.html where there are two]."),
    ] = None,
    heatmaps: Annotated[
        int,
        typer.Option(min=0, help="Heatmaps of so many kept and so many dropped texts a round, nearest its threshold."),
    ] = 0,
    filter_: Annotated[
        str | None,
        typer.Option("--filter", help="For them, the filter that scored the texts, where RUN does not hold it."),
    ] = None,
    fetch_inputs: FetchInputs = False,
    price: Price = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a run as one HTML page: metrics, charts, a gallery, a threshold to move. It needs no network.

    With two runs, both side by side: the images that they share, with both runs' scores, verdicts and captions.

    Example: `capfilt report runs/demo --heatmaps 12`, `capfilt report runs/a runs/b`
    """

    def work(progress: Progress) -> Any:
        with progress.wait("reading the run and writing its page"):
            result = inspection.report(
                run,
                other or None,
                out=out or None,
                fetch_inputs=fetch_inputs,
                heatmaps=heatmaps,
                filter=filter_ or None,
                price=price,
            )
        if result.joined == 0 and not as_json:
            say(f"{run} and {other} share no image of those compared (joined on uid): the page has their totals alone")
        return result.record

    execute(work, as_json, debug)


def review(
    run: Annotated[str, typer.Argument(help="A run folder with annotations.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1 [default: any that is free].")] = 0,
    fetch_inputs: FetchInputs = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print two lines of JSON: the address, and at the end the result.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Serve the report with buttons, to this machine alone, and store every click as a label in the run folder.

    `capfilt select --calibrate labels` sets a threshold on these labels.

    Example: `capfilt review runs/demo`
    """

    def work(_show: Progress) -> Any:
        from capfilt.pipelines.inspect import review as pipeline
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
