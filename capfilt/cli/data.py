"""The verbs that make shards: `download`, with img2dataset's names where it has one, `convert` and `pack`."""

from __future__ import annotations

import inspect
import json
import shlex
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from capfilt.api import data as api
from capfilt.cli.execute import call, execute
from capfilt.cli.jobs import words_of
from capfilt.cli.next_steps import Step, after_convert, after_download, trial
from capfilt.cli.options import Address, Cpus, Debug, Fork, Json, MinSuccess, SizedAddress, Workers
from capfilt.errors import RecipeError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from capfilt.runs.progress import Progress

_LIST, _PICTURE, _HOST, _RUN = "The list", "What is written", "How hosts are asked", "The run"


def _key(kind: Any, panel: str, help: str, *names: str) -> tuple[Any, Any]:
    """The type of an option that is a key of the recipe, and its default: None leaves it to the recipe's."""
    return Annotated[kind | None, typer.Option(*names, help=help, rich_help_panel=panel)], None


def _switch(panel: str, help: str, name: str) -> tuple[Any, Any]:
    return Annotated[bool, typer.Option(name, help=help, rich_help_panel=panel)], False


RECIPE = {
    "input_format": _key(str, _LIST, "csv, tsv, txt, json, jsonl, parquet [default: by the name]."),
    "url_col": _key(str, _LIST, "The column of URLs [default: url]."),
    "caption_col": _key(str, _LIST, "The column of texts [default: none]."),
    "save_additional_columns": _key(list[str], _LIST, 'Columns to keep: uid, or "uid,score", or \'["uid","score"]\'.'),
    "resize_mode": _key(str, _PICTURE, "no (bytes as served), border, keep_ratio, keep_ratio_largest, center_crop."),
    "image_size": _key(int, _PICTURE, "Pixels, where it is resized [default: 256]."),
    "resize_only_if_bigger": _key(bool, _PICTURE, "Leave small pictures small.", "--resize-only-if-bigger"),
    "encode_format": _key(str, _PICTURE, "jpg, png, webp [default: jpg]."),
    "encode_quality": _key(int, _PICTURE, "Of JPEG and WebP; of PNG the compression [default: 95]."),
    "skip_reencode": _key(bool, _PICTURE, "Keep bytes that need no resizing.", "--skip-reencode"),
    "min_image_size": _key(int, _PICTURE, "Refuse pictures with a shorter side [default: 0]."),
    "max_aspect_ratio": _key(float, _PICTURE, "Refuse longer pictures.", "--max-aspect-ratio"),
    "max_pixels": _key(
        int, _PICTURE, "Refuse larger pictures, undecoded [default: 64 million].", "--max-pixels", "--max-image-area"
    ),
    "shard_size": _key(int, _PICTURE, "Rows [default: 10000].", "--shard-size", "--number-sample-per-shard"),
    "oom_shard_count": _key(int, _PICTURE, "Digits of a shard's name [default: 5].", "--oom-shard-count"),
    "contact": _key(str, _HOST, "A page or address for the hosts to see."),
    "no_robots": _switch(_HOST, "Ignore robots.txt.", "--no-robots"),
    "disallowed_header_directives": _key(
        list[str], _HOST, "X-Robots-Tag that refuse [default: noai,noimageai,noindex,noimageindex]."
    ),
    "host_rate": _key(float, _HOST, "Requests a second to a host; 0 = any [default: 10]."),
    "timeout": _key(float, _HOST, "Seconds for one wait [default: 10]."),
    "deadline": _key(float, _HOST, "Seconds for one URL in all [default: 30]."),
    "retries": _key(int, _HOST, "Tries after a failure that may not last [default: 0]."),
    "max_bytes": _key(int, _HOST, "Bytes of a picture [default: 32 MiB]."),
    "allow_private": _key(list[str], _HOST, "A block (CIDR) to allow though it is private."),
    "deny": _key(list[str], _HOST, "A block (CIDR) to refuse though it is public."),
    "nat64": _key(list[str], _HOST, "A NAT64 prefix of your network [default: as its DNS gives]."),
    "use_proxies": _switch(_HOST, "Go through the environment's proxies.", "--use-proxies"),
    "thread_count": _key(int, _RUN, "Connections of a worker [default: 64]."),
}
"""The options that are keys of the recipe, with their types and defaults."""

_LISTS = ("save_additional_columns", "disallowed_header_directives", "allow_private", "deny", "nat64")
_SECTIONS = {
    **dict.fromkeys(("max_bytes", "allow_private", "deny", "nat64", "use_proxies"), "limits."),
    **dict.fromkeys(("contact", "host_rate", "timeout", "deadline", "retries"), "manners."),
}


def _with_recipe(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb with the options of `RECIPE` in place of its `**recipe`, behind its arguments."""
    kind = inspect.Parameter.KEYWORD_ONLY
    own = [each for each in inspect.signature(verb, eval_str=True).parameters.values() if each.name != "recipe"]
    keys = [inspect.Parameter(name, kind, annotation=of, default=value) for name, (of, value) in RECIPE.items()]
    first = [each for each in own if each.kind is not kind]
    verb.__signature__ = inspect.Signature([*first, *keys, *own[len(first) :]])  # type: ignore[attr-defined]
    return verb


Urls = Annotated[
    list[str], typer.Argument(help="csv, tsv, txt, json, jsonl, Parquet; .gz, .zst; folders, globs, URLs.")
]
DownloadOut = Annotated[
    str,
    typer.Option(
        "--out",
        "--output-folder",
        help="The run folder, or its URL (s3://...). The same command on the same folder resumes.",
    ),
]
Processes = Annotated[
    int, typer.Option("--workers", "--processes-count", help="0 = as many as fit.", rich_help_panel=_RUN, min=0)
]
Again = Annotated[
    list[str] | None,
    typer.Option(help="failed, or kinds of it (timeout,http-429): try these again.", rich_help_panel=_RUN),
]
Least = Annotated[
    float, typer.Option(help="Exit with 1 if a smaller share succeeds.", rich_help_panel=_RUN, min=0, max=1)
]
Drop = Annotated[
    int, typer.Option(help="Fail pictures whose bytes come under N URLs.", rich_help_panel=_RUN, min=0, metavar="N")
]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="E.g. manners.host_burst=4.")]


@_with_recipe
def download(
    context: typer.Context,
    urls: Urls,
    out: DownloadOut,
    *,
    workers: Processes = 0,
    retry: Again = None,
    min_success: Least = 0,
    drop_placeholders: Drop = 0,
    sets: Sets = None,
    fork: Fork = None,
    address: Address = "start",
    as_json: Json = False,
    debug: Debug = False,
    **recipe: Any,
) -> None:
    """Download a list of URLs into shards, as img2dataset does, politely, safely and to the end.

    Example: `capfilt download urls.parquet --out shards --caption-col text --contact me@example.org`
    """

    def work(show: Progress) -> Any:
        options = _assignments(recipe)
        with _named_as_typed(options):
            return api.download(
                urls,
                out=out,
                settings=[*options.values(), *(sets or ())],
                retry=_listed(retry or []),
                min_success=min_success,
                drop_placeholders=drop_placeholders,
                address=address,
                workers=workers,
                fork=fork,
                on_progress=show,
            ).record

    def next_steps(record: Any) -> list[Step]:
        words = words_of(context, {"retry", "fork"})
        if fork is not None:
            words = ["--out", fork, *words_of(context, {"retry", "fork", "out"})]
        again = shlex.join(["capfilt", "download", *words, "--retry=failed"])
        return after_download(fork or out, again, record, recipe["caption_col"] is not None, address)

    execute(work, as_json, debug, then=next_steps)


def _assignments(given: dict[str, Any]) -> dict[str, str]:
    """Options as `--set` has them, by their names as they are typed, so that both are checked alike."""
    recipe = {name: value for name, value in given.items() if value is not None}
    recipe["robots"] = not recipe.pop("no_robots")
    recipe |= {name: _listed(recipe[name]) for name in _LISTS if name in recipe}
    return {
        f"--{name.replace('_', '-')}": f"{_SECTIONS.get(name, '')}{name}={json.dumps(value, ensure_ascii=False)}"
        for name, value in recipe.items()
    }


@contextmanager
def _named_as_typed(options: dict[str, str]) -> Iterator[None]:
    """Blame an option for its value, and not the assignment that it was made into."""
    try:
        yield
    except RecipeError as error:
        message = str(error)
        for option, assignment in options.items():
            message = message.replace(f"--set {assignment}:", f"{option}:")
        raise RecipeError(message) from None


def _listed(words: list[str]) -> list[str]:
    """Several words of one option: given apart, with commas, or as img2dataset has them, '["a", "b"]'."""
    from capfilt.storage.documents import parse

    names: list[str] = []
    for word in words:
        if not word.startswith("["):
            names += word.split(",")
            continue
        try:
            names += [str(name) for name in parse(word.replace("'", '"').encode())]
        except ValueError as error:
            raise UsageError(f'{word} is no list; write it a,b or \'["a", "b"]\'.') from error
    return [name.strip() for name in names]


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
