"""The verb `decontaminate`: what of held-out sets is in a pool."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from capfilt.api import decontamination
from capfilt.cli.execute import execute
from capfilt.cli.next_steps import after_decontaminate
from capfilt.cli.options import Cpus, Debug, Json, Out, SizedAddress, Workers
from capfilt.cli.tables import print_contamination

if TYPE_CHECKING:
    from capfilt.runs.progress import Progress


Pool = Annotated[str, typer.Argument(metavar="EMBEDDINGS", help="The pool's embeddings: the --out of `capfilt embed`.")]
Against = Annotated[
    list[str],
    typer.Option(
        "--against",
        metavar="[NAME=]SPEC",
        help="A held-out set: shards with their texts, or a folder of pictures; may be repeated.",
    ),
]
By = Annotated[
    str,
    typer.Option(
        metavar="KIND,...",
        help="What makes a suspect: sha256, phash:BITS, text[:WORDS] (an equal text of so many words or more), and of"
        " embeddings with vectors vector:COSINE, or copy:, clip: or itc: for vectors of that kind.",
    ),
]
PoolShards = Annotated[
    list[str] | None,
    typer.Option(help="Where the pool's shards lie, for their texts [default: where they were embedded]."),
]
Model = Annotated[
    str | None, typer.Option(help="Where vectors are compared: the model that embedded the pool, as `embed` takes it.")
]
Copies = Annotated[int, typer.Option(min=1, help="Held-out pictures of which the self-test makes copies.")]
Fail = Annotated[bool, typer.Option("--fail", help="Exit with 1 unless the pool is clean.")]


def decontaminate(
    embeddings: Pool,
    against: Against,
    out: Out,
    by: By = decontamination.BY,
    shards: PoolShards = None,
    model: Model = None,
    self_test: Copies = 200,
    seed: Annotated[int, typer.Option(help="Which pictures the self-test takes.")] = 0,
    fail: Fail = False,
    workers: Workers = 0,
    cpus: Cpus = None,
    gpus: Annotated[float | None, typer.Option(min=0, help="GPUs of each worker, for vectors.")] = None,
    address: SizedAddress = "by-size",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Find copies of held-out pictures in a pool, and held-out texts; first test which copies would be found.

    Example: `capfilt decontaminate pool-embeddings --against coco-test=shards/coco-test --out contamination --fail`
    """

    def work(show: Progress) -> Any:
        record = decontamination.decontaminate(
            embeddings,
            against=against,
            out=out,
            by=by,
            shards=shards or (),
            model=model,
            self_test=self_test,
            seed=seed,
            fail=fail,
            address=address,
            workers=workers,
            cpus=cpus,
            gpus=gpus,
            on_progress=show,
        ).record
        if not as_json:
            print_contamination(record)
        return record

    execute(work, as_json, debug, show_result=False, then=lambda record: after_decontaminate(out, record, address))
