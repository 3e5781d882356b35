"""The verb `download` with its options: img2dataset's names where it has one, with `_` or `-`."""

from __future__ import annotations

import json
import shlex
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from capfilt.api import data
from capfilt.cli.execute import execute
from capfilt.cli.jobs import words_of
from capfilt.cli.next_steps import Step, after_download
from capfilt.cli.options import Address, Debug, Fork, Json
from capfilt.errors import RecipeError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from capfilt.runs.progress import Progress

_LIST, _PICTURE, _HOST, _RUN = "The list", "What is written", "How hosts are asked", "The run"


def _option(help: str, *names: str, panel: str, **settings: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **settings)


Urls = Annotated[
    list[str], typer.Argument(help="csv, tsv, txt, json, jsonl, Parquet; .gz, .zst; folders, globs, URLs.")
]
OutFolder = Annotated[
    str,
    typer.Option(
        "--out",
        "--output-folder",
        help="The run folder, or its URL (s3://...). The same command on the same folder resumes.",
    ),
]
Form = Annotated[str | None, _option("csv, tsv, txt, json, jsonl, parquet [default: by the name].", panel=_LIST)]
UrlCol = Annotated[str | None, _option("The column of URLs [default: url].", panel=_LIST)]
CaptionCol = Annotated[str | None, _option("The column of texts [default: none].", panel=_LIST)]
Additional = Annotated[
    list[str] | None, _option('Columns to keep: uid, or "uid,score", or \'["uid","score"]\'.', panel=_LIST)
]
Mode = Annotated[
    str | None, _option("no (bytes as served), border, keep_ratio, keep_ratio_largest, center_crop.", panel=_PICTURE)
]
Size = Annotated[int | None, _option("Pixels, where it is resized [default: 256].", panel=_PICTURE)]
OnlyIfBigger = Annotated[bool | None, _option("Leave small pictures small.", "--resize-only-if-bigger", panel=_PICTURE)]
Encode = Annotated[str | None, _option("jpg, png, webp [default: jpg].", panel=_PICTURE)]
Quality = Annotated[int | None, _option("Of JPEG and WebP; of PNG the compression [default: 95].", panel=_PICTURE)]
Skip = Annotated[bool | None, _option("Keep bytes that need no resizing.", "--skip-reencode", panel=_PICTURE)]
MinSize = Annotated[int | None, _option("Refuse pictures with a shorter side [default: 0].", panel=_PICTURE)]
MaxRatio = Annotated[float | None, _option("Refuse longer pictures.", "--max-aspect-ratio", panel=_PICTURE)]
MaxPixels = Annotated[
    int | None,
    _option(
        "Refuse larger pictures, undecoded [default: 64 million].", "--max-pixels", "--max-image-area", panel=_PICTURE
    ),
]
ShardSize = Annotated[
    int | None, _option("Rows [default: 10000].", "--shard-size", "--number-sample-per-shard", panel=_PICTURE)
]
Digits = Annotated[int | None, _option("Digits of a shard's name [default: 5].", "--oom-shard-count", panel=_PICTURE)]
Contact = Annotated[str | None, _option("A page or address for the hosts to see.", panel=_HOST)]
NoRobots = Annotated[bool, _option("Ignore robots.txt.", "--no-robots", panel=_HOST)]
Directives = Annotated[
    list[str] | None, _option("X-Robots-Tag that refuse [default: noai,noimageai,noindex,noimageindex].", panel=_HOST)
]
Rate = Annotated[float | None, _option("Requests a second to a host; 0 = any [default: 10].", panel=_HOST)]
Timeout = Annotated[float | None, _option("Seconds for one wait [default: 10].", panel=_HOST)]
Deadline = Annotated[float | None, _option("Seconds for one URL in all [default: 30].", panel=_HOST)]
Retries = Annotated[int | None, _option("Tries after a failure that may not last [default: 0].", panel=_HOST)]
MaxBytes = Annotated[int | None, _option("Bytes of a picture [default: 32 MiB].", panel=_HOST)]
Private = Annotated[list[str] | None, _option("A block (CIDR) to allow though it is private.", panel=_HOST)]
Deny = Annotated[list[str] | None, _option("A block (CIDR) to refuse though it is public.", panel=_HOST)]
Nat64 = Annotated[list[str] | None, _option("A NAT64 prefix of your network [default: as its DNS gives].", panel=_HOST)]
Proxies = Annotated[bool, _option("Go through the environment's proxies.", "--use-proxies", panel=_HOST)]
Threads = Annotated[int | None, _option("Connections of a worker [default: 64].", panel=_RUN)]
Workers = Annotated[int, _option("0 = as many as fit.", "--workers", "--processes-count", panel=_RUN, min=0)]
Retry = Annotated[list[str] | None, _option("failed, or kinds of it (timeout,http-429): try these again.", panel=_RUN)]
MinSuccess = Annotated[float, _option("Exit with 1 if a smaller share succeeds.", panel=_RUN, min=0, max=1)]
Drop = Annotated[int, _option("Fail pictures whose bytes come under N URLs.", panel=_RUN, min=0, metavar="N")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="E.g. manners.host_burst=4.")]


def download(
    context: typer.Context,
    urls: Urls,
    out: OutFolder,
    input_format: Form = None,
    url_col: UrlCol = None,
    caption_col: CaptionCol = None,
    save_additional_columns: Additional = None,
    resize_mode: Mode = None,
    image_size: Size = None,
    resize_only_if_bigger: OnlyIfBigger = None,
    encode_format: Encode = None,
    encode_quality: Quality = None,
    skip_reencode: Skip = None,
    min_image_size: MinSize = None,
    max_aspect_ratio: MaxRatio = None,
    max_pixels: MaxPixels = None,
    shard_size: ShardSize = None,
    oom_shard_count: Digits = None,
    contact: Contact = None,
    no_robots: NoRobots = False,
    disallowed_header_directives: Directives = None,
    host_rate: Rate = None,
    timeout: Timeout = None,
    deadline: Deadline = None,
    retries: Retries = None,
    max_bytes: MaxBytes = None,
    allow_private: Private = None,
    deny: Deny = None,
    nat64: Nat64 = None,
    use_proxies: Proxies = False,
    thread_count: Threads = None,
    workers: Workers = 0,
    retry: Retry = None,
    min_success: MinSuccess = 0,
    drop_placeholders: Drop = 0,
    sets: Sets = None,
    fork: Fork = None,
    address: Address = "start",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Download a list of URLs into shards, as img2dataset does, politely, safely and to the end.

    Example: `capfilt download urls.parquet --out shards --caption-col text --contact me@example.org`
    """
    given = {name: value for name, value in locals().items() if value is not None} | {"robots": not no_robots}
    execute(lambda show: _run(given, show), as_json, debug, then=lambda record: _next_steps(given, record))


def _run(given: dict[str, Any], show: Progress) -> Any:
    options = _assignments(given)
    with _named_as_typed(options):
        return data.download(
            given["urls"],
            out=given["out"],
            settings=[*options.values(), *given.get("sets", [])],
            retry=_listed(given.get("retry", [])),
            min_success=given["min_success"],
            drop_placeholders=given["drop_placeholders"],
            address=given["address"],
            workers=given["workers"],
            fork=given.get("fork"),
            on_progress=show,
        ).record


def _next_steps(given: dict[str, Any], record: Any) -> list[Step]:
    forked, words = given.get("fork"), words_of(given["context"], {"retry", "fork"})
    if forked is not None:
        words = ["--out", forked, *words_of(given["context"], {"retry", "fork", "out"})]
    again = shlex.join(["capfilt", "download", *words, "--retry=failed"])
    return after_download(given.get("fork") or given["out"], again, record, "caption_col" in given, given["address"])


_LISTS = ("save_additional_columns", "disallowed_header_directives", "allow_private", "deny", "nat64")
_SECTIONS = {
    **dict.fromkeys(("max_bytes", "allow_private", "deny", "nat64", "use_proxies"), "limits."),
    **dict.fromkeys(("contact", "host_rate", "timeout", "deadline", "retries"), "manners."),
}
_COMMAND = (
    "urls", "out", "workers", "retry", "min_success", "drop_placeholders", "no_robots", "sets", "fork", "address",
    "as_json", "debug", "context",
)  # fmt: skip
"""Options that are no part of the recipe."""


def _assignments(given: dict[str, Any]) -> dict[str, str]:
    """Options as `--set` has them, by their names as they are typed, so that both are checked alike."""
    recipe = {name: _listed(value) if name in _LISTS else value for name, value in given.items()}
    return {
        f"--{name.replace('_', '-')}": f"{_SECTIONS.get(name, '')}{name}={json.dumps(value, ensure_ascii=False)}"
        for name, value in recipe.items()
        if name not in _COMMAND
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
