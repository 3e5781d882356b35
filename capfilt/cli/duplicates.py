"""The verbs `embed` and `dedup`."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from capfilt.api import duplicates
from capfilt.cli.execute import execute
from capfilt.cli.next_steps import after_dedup
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


class Keep(StrEnum):
    """Which of near pictures is kept."""

    best = "best"
    largest = "largest"
    first = "first"


class Scope(StrEnum):
    """Where copies are searched."""

    pool = "pool"
    shard = "shard"


def dedup(
    embeddings: Annotated[
        str, typer.Argument(help="The --out of `capfilt embed`, or of `capfilt annotate --keep-vectors`.")
    ],
    out: Out,
    by: Annotated[
        str,
        typer.Option(
            "--by", metavar="sha256,phash:BITS,vector:COSINE", help="What counts as near; vector needs a model."
        ),
    ] = "sha256,phash:3",
    keep: Annotated[
        Keep,
        typer.Option(
            "--keep",
            help="Which one stays: best: of the highest score, then the most pixels; largest: the most pixels; first.",
        ),
    ] = Keep.best,
    scope: Annotated[
        Scope, typer.Option("--scope", help="pool: copies in all shards; shard: within each shard alone.")
    ] = Scope.pool,
    scored: Annotated[
        str | None, typer.Option("--scores", metavar="RUN", help="The --out of `capfilt annotate`, for --keep best.")
    ] = None,
    merge_texts: Annotated[
        bool, typer.Option("--merge-texts", help="Hand the texts of copies to the picture that stays.")
    ] = False,
    fetch_inputs: Annotated[
        bool, typer.Option("--fetch-inputs", help="Read shards wherever EMBEDDINGS names them; for --merge-texts.")
    ] = False,
    workers: Workers = 0,
    cpus: Cpus = None,
    address: SizedAddress = "by-size",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Find copies of pictures: one stays, and each other one is named with the one that stands for it.

    Example: `capfilt dedup runs/e --by sha256,phash:3 --out runs/d`, then `capfilt select ... --without runs/d`
    """

    def work(show: Progress) -> Any:
        return duplicates.dedup(
            embeddings,
            out=out,
            by=by,
            keep=keep.value,
            scope=scope.value,
            scores=scored,
            merge_texts=merge_texts,
            fetch_inputs=fetch_inputs,
            address=address,
            workers=workers,
            cpus=cpus,
            on_progress=show,
        ).record

    execute(work, as_json, debug, then=lambda _: after_dedup(out))
