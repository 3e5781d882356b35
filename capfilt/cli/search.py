"""The verbs `index` and `retrieve`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from capfilt.api import search
from capfilt.cli.execute import execute
from capfilt.cli.options import Cpus, Debug, Json, Out, SizedAddress, Workers
from capfilt.cli.tables import print_neighbours

if TYPE_CHECKING:
    from capfilt.runs.progress import Progress

Embeddings = Annotated[str, typer.Argument(help="The --out of `capfilt embed --model`.")]


def index(
    embeddings: Embeddings,
    out: Out,
    workers: Workers = 0,
    cpus: Cpus = None,
    address: SizedAddress = "by-size",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make an index of pictures by their vectors, on disk, for `retrieve`.

    Example: `capfilt index runs/e --out runs/index`
    """

    def work(show: Progress) -> Any:
        return search.build_index(
            embeddings, out=out, address=address, workers=workers, cpus=cpus, on_progress=show
        ).record

    execute(work, as_json, debug)


def retrieve(
    index: Annotated[str, typer.Option("--index", help="The --out of `capfilt index`.")],
    text: Annotated[str | None, typer.Argument(help="What to look for, in words.")] = None,
    image: Annotated[str | None, typer.Option("--image", help="Or a picture to look for.")] = None,
    k: Annotated[int, typer.Option("--k", min=1, max=1000, help="How many pictures.")] = 20,
    model: Annotated[
        str | None,
        typer.Option("--model", help="What made the vectors, if not where it was; a descriptor always: copy=FILE."),
    ] = None,
    html: Annotated[
        str | None, typer.Option("--html", help="Also write a page, with the pictures from their shards.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Find the pictures of an index that are nearest to a text or a picture.

    Example: `capfilt retrieve --index runs/index "a red ring"`, `capfilt retrieve --index runs/index --image cat.jpg`
    """

    def work(show: Progress) -> Any:
        result = search.retrieve(index, text, image=image, k=k, model=model, html=html, on_progress=show)
        if not as_json:
            print_neighbours(result)
        return result.record

    execute(work, as_json, debug, show_result=False)
