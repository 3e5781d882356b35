"""The verbs `convert` and `pack`: published data sets of the downstream tasks, and data of any kind, to shards."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from capfilt.api import data as api
from capfilt.cli.execute import call
from capfilt.cli.next_steps import after_convert, trial
from capfilt.cli.options import Cpus, Debug, Json, MinSuccess, SizedAddress, Workers


class Task(StrEnum):
    """The tasks whose data sets can be read."""

    vqa = "vqa"
    nlvr2 = "nlvr2"
    entailment = "entailment"
    grounding = "grounding"
    dialog = "dialog"
    retrieval = "retrieval"
    captioning = "captioning"


TaskName = Annotated[Task, typer.Argument(help="What the data set is for.")]
Files = Annotated[
    list[str],
    typer.Argument(
        help="Its published files: VQAv2, NLVR2, SNLI-VE, RefCOCO/+/g (REFER, X-VLM), VisDial, Karpathy's COCO or"
        " Flickr30k."
    ),
]
Images = Annotated[str, typer.Option("--images", help="The folder of its pictures, or one above.")]
OutFolder = Annotated[
    str,
    typer.Option("--out", help="The run folder for the shards, or its URL (s3://...). The same command resumes."),
]
Split = Annotated[
    list[str] | None,
    typer.Option("--split", help="Which splits, where files hold several: train,restval; may be repeated."),
]
ShardSize = Annotated[int | None, typer.Option("--shard-size", min=1, help="Pictures of a shard [default: 1000].")]
Retry = Annotated[
    str | None, typer.Option(metavar="failed", help="failed: look for missing and broken pictures again.")
]


def convert(
    task: TaskName,
    files: Files,
    images: Images,
    out: OutFolder,
    split: Split = None,
    shard_size: ShardSize = None,
    retry: Retry = None,
    workers: Workers = 0,
    cpus: Cpus = None,
    min_success: MinSuccess = 0,
    address: SizedAddress = "by-size",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make shards for a downstream task from the files in which its data set is published.

    Example: `capfilt convert vqa questions.json annotations.json --images coco/val2014 --out vqa-val`
    """

    given = locals() | {"task": task.value, "split": [name for word in split or () for name in word.split(",") if name]}
    call(api.convert, given, then=lambda _: after_convert(task.value, out, address))


Data = Annotated[
    list[str],
    typer.Argument(
        help="Folders of pictures, Parquet, saved datasets, Lance, captions as JSON, tars (docs/shards.md)."
    ),
]


def pack(
    data: Data,
    out: OutFolder,
    workers: Workers = 0,
    cpus: Cpus = None,
    min_success: MinSuccess = 0,
    address: SizedAddress = "by-size",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write data as shards once: the pictures' own bytes, their texts, a uid and a sha256 of each.

    Every verb reads such data as they lie, too; tars are for other loaders, and for stores.

    Example: `capfilt pack photos/ --out shards`
    """
    call(api.pack, locals(), then=lambda _: [trial(out, out, address)])
