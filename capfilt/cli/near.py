"""The verbs of near pictures: `embed`, `dedup`, `index`, `retrieve`, `decontaminate`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from capfilt.api import near as api
from capfilt.cli.execute import call
from capfilt.cli.next_steps import after_decontaminate, after_dedup
from capfilt.cli.options import Cpus, Debug, Fork, Json, MinSuccess, Out, Shards, SizedAddress, Workers, setting
from capfilt.cli.pipelines import Gpus, Limit
from capfilt.cli.tables import print_contamination, print_neighbours

VectorModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="What makes vectors: a model, or copy=FILE, a TorchScript descriptor such as SSCD's, whose code is run."
        " Without it: hashes alone.",
    ),
]
EmbedSets = Annotated[list[str] | None, setting("E.g. batch_size=128; for copy=FILE size=512, preprocess.shape=...")]


def embed(
    shards: Shards,
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
    call(api.embed, locals())


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
    call(api.dedup, locals(), then=lambda _: after_dedup(out))


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
    call(api.build_index, locals())


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
    call(api.retrieve, locals(), print_neighbours)


PoolEmbeddings = Annotated[
    str, typer.Argument(metavar="EMBEDDINGS", help="The pool's embeddings: the --out of `capfilt embed`.")
]
Against = Annotated[
    list[str],
    typer.Option(
        "--against",
        metavar="[NAME=]SPEC",
        help="A held-out set: shards with their texts, or a folder of pictures; may be repeated.",
    ),
]
Suspects = Annotated[
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
PoolModel = Annotated[
    str | None, typer.Option(help="Where vectors are compared: the model that embedded the pool, as `embed` takes it.")
]
Copies = Annotated[int, typer.Option(min=1, help="Held-out pictures of which the self-test makes copies.")]
Fail = Annotated[bool, typer.Option("--fail", help="Exit with 1 unless the pool is clean.")]


def decontaminate(
    embeddings: PoolEmbeddings,
    against: Against,
    out: Out,
    by: Suspects = api.BY,
    shards: PoolShards = None,
    model: PoolModel = None,
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
    call(
        api.decontaminate,
        locals(),
        lambda result: print_contamination(result.record),
        lambda record: after_decontaminate(out, record, address),
    )
