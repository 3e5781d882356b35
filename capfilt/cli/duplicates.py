"""The verb `embed`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from capfilt.api import duplicates
from capfilt.cli.execute import execute
from capfilt.cli.options import Cpus, Debug, Fork, Json, MinSuccess, Out, SizedAddress, Workers
from capfilt.cli.pipelines import Gpus, Limit

if TYPE_CHECKING:
    from capfilt.runs.progress import Progress

VectorModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="What makes vectors: a model, or copy=FILE, a TorchScript descriptor such as SSCD's, whose code is run."
        " Without it: hashes alone.",
    ),
]
EmbedSets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="a.b=c", help="E.g. batch_size=128; for copy=FILE size=512, preprocess.shape=..."),
]


def embed(
    shards: Annotated[list[str], typer.Argument(help="Tars, folders, globs, braces, fsspec URLs.")],
    out: Out,
    model: VectorModel = None,
    sets: EmbedSets = None,
    gpus: Gpus = None,
    workers: Workers = 0,
    cpus: Cpus = None,
    limit: Limit = 0,
    retry: Annotated[
        str | None, typer.Option(metavar="failed", help="failed: repeat the shards in which samples failed.")
    ] = None,
    min_success: MinSuccess = 0,
    fork: Fork = None,
    address: SizedAddress = "by-size",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Hash every picture of shards and, with a model, make a vector of it: what `dedup` compares.

    Example: `capfilt embed shards/ --out runs/e`
    """

    def work(show: Progress) -> Any:
        return duplicates.embed(
            shards,
            out=out,
            model=model,
            settings=sets or (),
            address=address,
            workers=workers,
            cpus=cpus,
            gpus=gpus,
            limit=limit,
            retry=retry,
            min_success=min_success,
            fork=fork,
            on_progress=show,
        ).record

    execute(work, as_json, debug)
