"""download: img2dataset's shards from a list of URLs, fenced and made to finish.

A list is planned into shards, a shard is fetched by one task and committed like every other stage. The run folder is
img2dataset's output folder: tars, Parquets, stats and sizes.json lie at its top, plans in plan/.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from capfilt.cluster.rate_limit import Ticket, shared_turns
from capfilt.cluster.session import Session
from capfilt.cluster.worker_pool import Resources
from capfilt.config import Config
from capfilt.data import shards
from capfilt.downloading import fetch, placeholders, plans, url_lists
from capfilt.downloading.fetch import Layout, PictureConfig
from capfilt.downloading.finalize import settle
from capfilt.downloading.http.client import Limits, SafeHttpClient
from capfilt.downloading.http.politeness import Politeness, Visitor, agent
from capfilt.downloading.plans import Pass
from capfilt.downloading.url_lists import Columns
from capfilt.errors import RunError, ShortfallError
from capfilt.runs.ledger import Completion, Ledger, fingerprint
from capfilt.runs.progress import Progress
from capfilt.runs.tally import Tally
from capfilt.stages.runner import run_stage
from capfilt.storage import documents
from capfilt.storage.atomic import sha256_file
from capfilt.storage.paths import RemotePath, StoragePath, remove_all

STAGE = "download"
REFUSED = ("noai", "noimageai", "noindex", "noimageindex")
SHOWN = 10
"""Repeated pictures that the summary names."""
TMP = "tmp"
"""Where shards are while they are fetched; swept when a run is taken up."""


class DownloadConfig(Columns, PictureConfig):
    """What is downloaded. All but `manners` decides what is written, and cannot be changed in a run folder."""

    urls: tuple[str, ...] = Field(min_length=1)
    """Lists of URLs: files, folders, globs, braces, fsspec URLs."""
    input_format: str | None = None
    """csv | tsv | txt | json | jsonl | parquet, where the names of the lists do not tell."""
    shard_size: int = Field(default=10_000, gt=0)
    """Rows of a shard: img2dataset's number_sample_per_shard."""
    oom_shard_count: int = Field(default=5, ge=1, le=12)
    """Digits of a shard's name."""
    robots: bool = True
    """Ask robots.txt, and do as it says."""
    disallowed_header_directives: tuple[str, ...] = REFUSED
    """Directives of X-Robots-Tag that refuse a picture."""
    user_agent_token: str = Field(default="capfilt", pattern=r"^[A-Za-z_-]+$")
    """A name to which robots.txt and X-Robots-Tag may speak, beside `capfilt`."""
    limits: Limits = Limits()
    manners: Politeness = Politeness()
    thread_count: int = Field(default=64, ge=1, le=1024)
    """Connections that one worker has open at once."""

    @field_validator("urls", mode="before")
    @classmethod
    def _one(cls, urls: object) -> object:
        return (urls,) if isinstance(urls, str) else urls

    def decides(self) -> dict[str, Any]:
        """What decides the outcome, as JSON has it; the lists are told apart by their contents."""
        return self.model_dump(mode="json", exclude={"urls", "input_format", "manners", "thread_count"})


class Wishes(Config):
    """What is asked of one command on a run folder; none of it is remembered."""

    retry: tuple[str, ...] = ()
    """Kinds of failure to try again; "failed" stands for all of them."""
    min_success: float = Field(default=0, ge=0, le=1)
    drop_placeholders: int = Field(default=0, ge=0)
    """Turn pictures whose bytes came under so many URLs into failures; 0 = none."""


class DownloadJob(Config):
    """What a downloading worker needs to know; an item is the name of a shard."""

    out: StoragePath
    config: DownloadConfig
    ticket: Ticket = Ticket()

    @property
    def name(self) -> str:
        """The stage."""
        return STAGE

    def identity(self, item: str) -> str:
        """The options and the planned rows."""
        return fingerprint(self.config.decides(), sha256_file(self.out / "plan" / f"{item}.parquet"))

    def open(self) -> Callable[[str], str]:
        """Import img2dataset and build the fence, once a worker."""
        fetch.load_img2dataset()
        config = self.config
        token = config.user_agent_token
        fence = SafeHttpClient(config.limits, agent(config.manners.contact, token))
        refused = frozenset(directive.strip().lower() for directive in config.disallowed_header_directives)
        visitor = Visitor(fence, self.ticket.connect(), config.manners, config.robots, refused, token)
        return lambda shard: self.shard(shard, visitor)

    def shard(self, shard: str, visitor: Visitor) -> str:
        """Fetch one shard, put it in order, and commit it."""
        config = self.config
        rows = plans.read(self.out / "plan", shard)
        layout = Layout(size=config.shard_size, digits=config.oom_shard_count)
        # Beside the shards, where there is room for them; of a run on a store, wherever this machine has its own.
        home = None if isinstance(self.out, RemotePath) else self.out / TMP
        if home is not None:
            documents.make_folder(home)
        with tempfile.TemporaryDirectory(dir=home, prefix=f"capfilt-{shard}-{os.getpid()}-") as folder:
            pictures = PictureConfig.model_validate(config.model_dump(include=set(PictureConfig.model_fields)))
            written = fetch.fetch(rows, int(shard), Path(folder), pictures, visitor, config.thread_count, layout)
            outputs, tally = settle(written, rows, self.out, config.shard_size)
        Ledger(self.out, STAGE).commit(shard, self.identity(shard), outputs, tally)
        return f"{tally.samples['kept']} of {tally.samples['in']} pictures"


def check_enough(label: str, summary: dict[str, Any], least: float = 0) -> None:
    """Raise ShortfallError, with the commonest reason, where no picture came, or a smaller share than `least`."""
    if summary["enough"]:
        return
    came, kept = summary["samples"]["in"], summary["samples"]["kept"]
    [(reason, count), *_] = summary["failed"].items()
    wanted = f" ({summary['success_rate']:.2%}, and --min-success asks for {least:.2%})" if kept else ""
    raise ShortfallError(
        f"{label}: {kept} of {came} pictures came{wanted}; {count} failed by: {reason}. What came stays."
        " `--retry failed`, or a kind of it, tries these again.",
        summary,
    )


def list_identities(config: DownloadConfig) -> list[dict[str, Any]]:
    """What tells the lists from others, all of them found."""
    sources = url_lists.find(config.urls, config.input_format)
    return [{"format": source.form, **url_lists.identity(source, config)} for source in sources]


def download(
    session: Session,
    config: DownloadConfig,
    out: StoragePath,
    resources: Resources,
    show: Progress,
    wishes: Wishes | None = None,
    label: str = STAGE,
) -> dict[str, Any]:
    """Bring every planned shard to its commit, retry what is wished for, and count; returns the summary."""
    wishes = wishes or Wishes()
    remove_tmp(out)
    planned = plans.passes(out / "plan") or [plan_lists(config, out, show)]
    resumes_retry = len(planned) > 1 and not all_done(out, planned, config)
    fetch_all(session, config, out, planned, resources, show, label)
    if wishes.retry and not resumes_retry:
        again = plans.plan_retry(
            out / "plan", planned, out, config, wishes.retry, config.shard_size, config.oom_shard_count
        )
        if again is None:
            show.say(f"{label}: nothing that failed is left to be tried again")
        else:
            planned = [*planned, again]
            fetch_all(session, config, out, planned, resources, show, f"{label}, try {again.number + 1}")
    repeats = repeated_pictures(out, planned, config, wishes.drop_placeholders, show, label)
    return summarise(out, planned, config, wishes, repeats)


def plan_lists(config: DownloadConfig, out: StoragePath, show: Progress) -> Pass:
    """Split the lists into shards, in this process: one shard of rows is in memory at a time."""
    sources = url_lists.find(config.urls, config.input_format)
    with show.stage("plan", 1) as line:
        plans.remove(out / "plan")
        made = plans.plan_list(
            out / "plan",
            sources,
            config,
            config.shard_size,
            config.oom_shard_count,
            lambda rows: line.move(0, f"{rows} rows"),
        )
        line.move(1, f"{made.rows} rows in {made.shards} shards")
    return made


def names(planned: Sequence[Pass], config: DownloadConfig) -> list[str]:
    """Every planned shard."""
    count = planned[-1].first + planned[-1].shards
    return [plans.name(shard, config.oom_shard_count) for shard in range(count)]


def all_done(out: StoragePath, planned: Sequence[Pass], config: DownloadConfig) -> bool:
    """Whether every planned shard is committed."""
    job, ledger = DownloadJob(out=out.absolute(), config=config), Ledger(out, STAGE)
    return all(ledger.completion(shard, job.identity(shard)) for shard in names(planned, config))


def fetch_all(
    session: Session,
    config: DownloadConfig,
    out: StoragePath,
    planned: Sequence[Pass],
    resources: Resources,
    show: Progress,
    label: str,
) -> None:
    """Fetch the shards that are not committed yet."""
    with shared_turns(session, config.manners.host_rate, config.manners.host_burst) as ticket:
        job = DownloadJob(out=out.absolute(), config=config, ticket=ticket)
        run_stage(session, job, {shard: shard for shard in names(planned, config)}, resources, show, label)
    remove_tmp(out)


def remove_tmp(out: StoragePath) -> None:
    """Remove the shards that were not fetched to their end."""
    if not isinstance(out, RemotePath):
        remove_all(out / TMP)


def repeated_pictures(
    out: StoragePath, planned: Sequence[Pass], config: DownloadConfig, least: int, show: Progress, label: str
) -> Counter[str]:
    """Pictures whose bytes came under several URLs; those with `least` URLs or more become failures."""
    own = names(planned, config)
    repeats = placeholders.repeated([out / f"{shard}.parquet" for shard in own], SHOWN, least)
    dropped = Counter({digest: count for digest, count in repeats.items() if least and count >= least})
    if not dropped:
        return repeats
    job, ledger = DownloadJob(out=out.absolute(), config=config), Ledger(out, STAGE)
    with show.stage(f"{label}, placeholders", len(own)) as line:
        for number, shard in enumerate(own, 1):
            identity = job.identity(shard)

            def commit(
                outputs: list[StoragePath], tally: Tally, shard: str = shard, identity: str = identity
            ) -> Completion:
                return ledger.commit(shard, identity, outputs, tally)

            placeholders.drop(out, shard, dropped, commit)
            line.move(number)
    return repeats


def summarise(
    out: StoragePath, planned: Sequence[Pass], config: DownloadConfig, wishes: Wishes, repeats: Counter[str]
) -> dict[str, Any]:
    """What became of the list: a row that was tried again counts once, by its newest outcome."""
    done = {completion.shard: completion for completion in Ledger(out, STAGE).completions()}
    own = [done[shard] for shard in names(planned, config)]
    tally = sum((completion.tally for completion in own), Tally.zero())
    failed = Counter(tally.failed)
    for later in planned:
        failed.subtract(later.retried)
    if planned[0].unreadable:
        failed["unreadable-row"] = planned[0].unreadable
    came = planned[0].rows + planned[0].unreadable
    kept = tally.samples["kept"]
    if came != kept + failed.total() or min(failed.values(), default=0) < 0:
        raise RunError(
            f"{out}: {came} rows in, but {kept} kept + {failed.total()} failed. A shard was fetched again after what"
            " failed of it had been retried, so rows have two outcomes; download into another --out."
        )
    write_sizes(out, {f"{completion.shard}.tar": completion.tally.samples["kept"] for completion in own})
    return {
        "command": "download",
        "shards": str(out),
        "samples": {"in": came, "kept": kept, "failed": failed.total()},
        "success_rate": round(kept / came, 4),
        "enough": kept > 0 and kept >= wishes.min_success * came,
        "failed": {kind: count for kind, count in failed.most_common() if count},
        "repeated": dict(repeats.most_common(SHOWN)),
    }


def write_sizes(out: StoragePath, counts: dict[str, int]) -> None:
    """Write sizes.json, unless it says so already: a rerun touches nothing."""
    path = out / "sizes.json"
    if not path.is_file() or documents.read_json(path, documents.PLAN_BYTES) != counts:
        shards.write_sizes(out, counts)
