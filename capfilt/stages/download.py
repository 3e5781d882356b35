"""download: img2dataset's shards from a list of URLs, fetched safely and to the end.

A list is planned into shards, a shard is fetched by one task and committed like every other stage. The run folder is
img2dataset's output folder: tars, Parquets, stats and sizes.json lie at its top, plans in plan/.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator

from capfilt.cluster.rate_limit import RateLimiterHandle, shared_rate_limiter
from capfilt.cluster.session import Session
from capfilt.cluster.worker_pool import Resources
from capfilt.config import Config
from capfilt.downloading import placeholders, plans
from capfilt.downloading.fetch import PictureConfig, fetch, import_img2dataset
from capfilt.downloading.finalize import finalize
from capfilt.downloading.http.client import Limits, SafeHttpClient
from capfilt.downloading.http.politeness import PoliteClient, Politeness, user_agent
from capfilt.downloading.plans import Pass, ShardLayout
from capfilt.downloading.url_lists.files import find_files, identity
from capfilt.downloading.url_lists.tables import Columns
from capfilt.errors import RunError, ShortfallError
from capfilt.runs.ledger import Ledger, fingerprint
from capfilt.runs.progress import Progress
from capfilt.runs.tally import Tally
from capfilt.stages.outputs import write_sizes
from capfilt.stages.runner import run_stage
from capfilt.storage.atomic import sha256_file
from capfilt.storage.paths import StoragePath, make_folder, remove_folder
from capfilt.storage.remote_path import RemotePath

STAGE = "download"
REFUSED = ("noai", "noimageai", "noindex", "noimageindex")
SHOWN = 10
"""Repeated pictures that the summary names."""
TMP = "tmp"
"""Where shards are while they are fetched; removed when a run is continued."""


class DownloadConfig(Columns, PictureConfig):
    """What is downloaded. All but `manners` decides what is written, and cannot be changed in a run folder."""

    urls: tuple[str, ...] = Field(min_length=1)
    """Lists of URLs: files, folders, globs, braces, fsspec URLs."""
    input_format: str | None = None
    """csv | tsv | txt | json | jsonl | parquet, where the names of the lists do not say it."""
    shard_size: int = Field(default=10_000, gt=0)
    """Rows of a shard: img2dataset's number_sample_per_shard."""
    oom_shard_count: int = Field(default=5, ge=1, le=12)
    """Digits of a shard's name."""
    robots: bool = True
    """Whether to keep to robots.txt."""
    disallowed_header_directives: tuple[str, ...] = REFUSED
    """Directives of X-Robots-Tag that refuse a picture."""
    user_agent_token: str = Field(default="capfilt", pattern=r"^[A-Za-z_-]+$")
    """A name to which robots.txt and X-Robots-Tag may speak, beside `capfilt`."""
    limits: Limits = Limits()
    """What one URL may cost, and where it may lead."""
    manners: Politeness = Politeness()
    """How hosts are asked; a resumed run may ask otherwise."""
    thread_count: int = Field(default=64, ge=1, le=1024)
    """Connections that one worker has open at once."""

    @field_validator("urls", mode="before")
    @classmethod
    def _as_tuple(cls, urls: object) -> object:
        return (urls,) if isinstance(urls, str) else urls

    @property
    def layout(self) -> ShardLayout:
        """How shards are cut and named."""
        return ShardLayout(size=self.shard_size, digits=self.oom_shard_count)

    @property
    def pictures(self) -> PictureConfig:
        """What is written of a picture, alone."""
        return PictureConfig.model_validate(self.model_dump(include=set(PictureConfig.model_fields)))

    def outcome_fields(self) -> dict[str, Any]:
        """The fields that decide what is written, as JSON has them; the lists count by their contents instead."""
        return self.model_dump(mode="json", exclude={"urls", "input_format", "manners", "thread_count"})


class DownloadOptions(Config):
    """What one command does beside the download itself; none of it is recorded in the run folder."""

    retry: tuple[str, ...] = ()
    """Kinds of failure to try again; "failed" stands for all of them."""
    min_success: float = Field(default=0, ge=0, le=1)
    """The share of the rows that must succeed; below it the command ends with 1."""
    drop_placeholders: int = Field(default=0, ge=0)
    """Turn pictures whose bytes came under so many URLs into failures; 0 = none."""


class DownloadJob(Config):
    """Fetches shards in a worker; an item is the name of a shard."""

    unit: ClassVar[str] = "shards"
    name: ClassVar[str] = STAGE
    lists_images: ClassVar[bool] = True
    loads: ClassVar[str] = "img2dataset to load"

    out: StoragePath
    config: DownloadConfig
    ticket: RateLimiterHandle = RateLimiterHandle()

    def identity(self, item: str) -> str:
        """The fingerprint of the options and of the shard's planned rows."""
        return fingerprint(self.config.outcome_fields(), sha256_file(self.out / "plan" / f"{item}.parquet"))

    def open(self) -> Callable[[str], None]:
        """Import img2dataset and build the HTTP client, once a worker."""
        import_img2dataset()
        config = self.config
        token = config.user_agent_token
        safe = SafeHttpClient(config.limits, user_agent(config.manners.contact, token))
        refused = frozenset(directive.strip().lower() for directive in config.disallowed_header_directives)
        client = PoliteClient(safe, self.ticket.connect(), config.manners, config.robots, refused, token)
        return lambda shard: self.fetch_shard(shard, client)

    def fetch_shard(self, shard: str, client: PoliteClient) -> None:
        """Fetch one shard, write its final files, and commit it."""
        config = self.config
        rows = plans.read(self.out / "plan", shard)
        # Beside the shards, where there is room for them; of a run on a store, in this machine's temporary folder.
        home = None if isinstance(self.out, RemotePath) else self.out / TMP
        if home is not None:
            make_folder(home)
        with tempfile.TemporaryDirectory(dir=home, prefix=f"capfilt-{shard}-{os.getpid()}-") as folder:
            raw = fetch(rows, int(shard), Path(folder), config.pictures, client, config.thread_count, config.layout)
            outputs, tally = finalize(raw, rows, self.out, config.layout)
        Ledger(self.out, STAGE).commit(shard, self.identity(shard), outputs, tally)


def check_success_rate(label: str, summary: dict[str, Any], least: float = 0) -> None:
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
    """What tells the lists from others: format, name, size and version of each of their files."""
    columns = config.by_new_name.values()
    return [{"format": file.format, **identity(file, columns)} for file in find_files(config.urls, config.input_format)]


def download(
    session: Session,
    config: DownloadConfig,
    out: StoragePath,
    resources: Resources,
    show: Progress,
    options: DownloadOptions | None = None,
) -> dict[str, Any]:
    """Bring every planned shard to its commit, retry what `options` name, and count; returns the summary.

    Raises:
        DataError: a list that cannot be read, or has no rows.
        RunError: a shard that cannot be fetched, or rows with two outcomes.
    """
    options = options or DownloadOptions()
    run = _Download(session, config, out, resources, show)
    remove_tmp(out)
    planned = plans.passes(out / "plan") or [run.plan()]
    interrupted_retry = len(planned) > 1 and not run.is_complete(planned)
    run.fetch(planned, STAGE)
    if options.retry and not interrupted_retry:
        planned = run.retry(planned, options.retry)
    repeated = run.drop_placeholders(planned, options.drop_placeholders)
    return run.summarise(planned, options, repeated)


def remove_tmp(out: StoragePath) -> None:
    """Remove what is left of shards whose fetching was interrupted."""
    if not isinstance(out, RemotePath):
        remove_folder(out / TMP)


@dataclass(frozen=True)
class _Download:
    """The steps of `download`, in the process that drives it."""

    session: Session
    config: DownloadConfig
    out: StoragePath
    resources: Resources
    show: Progress

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.out, STAGE)

    def job(self, ticket: RateLimiterHandle | None = None) -> DownloadJob:
        return DownloadJob(out=self.out.absolute(), config=self.config, ticket=ticket or RateLimiterHandle())

    def names(self, planned: Sequence[Pass]) -> list[str]:
        """The names of all planned shards."""
        return [self.config.layout.name(shard) for shard in range(planned[-1].first + planned[-1].shards)]

    def is_complete(self, planned: Sequence[Pass]) -> bool:
        """Whether every planned shard is committed."""
        job, ledger = self.job(), self.ledger
        return all(ledger.completion(shard, job.identity(shard)) for shard in self.names(planned))

    def plan(self) -> Pass:
        """Split the lists into shards, in this process: one shard of rows is in memory at a time."""
        files = find_files(self.config.urls, self.config.input_format)
        with self.show.stage("plan", 1) as line:
            plans.remove_unfinished(self.out / "plan")
            planned = plans.plan_list(
                self.out / "plan", files, self.config, self.config.layout, lambda rows: line.update(0, f"{rows} rows")
            )
            line.update(1, f"{planned.rows:,} rows in {planned.shards:,} shard{'s' * (planned.shards != 1)}")
        return planned

    def fetch(self, planned: Sequence[Pass], label: str) -> None:
        """Fetch the shards that are not committed yet."""
        with shared_rate_limiter(self.session, self.config.manners.host_rate, self.config.manners.host_burst) as ticket:
            items = {shard: shard for shard in self.names(planned)}
            run_stage(self.session, self.job(ticket), items, self.resources, self.show, label)
        remove_tmp(self.out)

    def retry(self, planned: list[Pass], kinds: Sequence[str]) -> list[Pass]:
        """Plan and fetch what failed with one of `kinds`; returns all passes."""
        again = plans.plan_retry(self.out / "plan", planned, self.out, self.config, kinds, self.config.layout)
        if again is None:
            self.show.say(f"{STAGE}: nothing that failed is left to be tried again")
            return planned
        planned = [*planned, again]
        self.fetch(planned, f"{STAGE}, try {again.number + 1}")
        return planned

    def drop_placeholders(self, planned: Sequence[Pass], min_count: int) -> Counter[str]:
        """Count pictures whose bytes came under several URLs; those with `min_count` URLs or more become failures."""
        names = self.names(planned)
        repeated = placeholders.count_repeated([self.out / f"{shard}.parquet" for shard in names], SHOWN, min_count)
        dropped = Counter({digest: count for digest, count in repeated.items() if min_count and count >= min_count})
        if not dropped:
            return repeated
        job, ledger = self.job(), self.ledger
        with self.show.stage(f"{STAGE}, placeholders", len(names)) as line:
            for number, shard in enumerate(names, 1):
                placeholders.drop(self.out, shard, dropped, partial(ledger.commit, shard, job.identity(shard)))
                line.update(number)
        return repeated

    def summarise(self, planned: Sequence[Pass], options: DownloadOptions, repeated: Counter[str]) -> dict[str, Any]:
        """What became of the list: a row that was tried again counts once, by its newest outcome."""
        names, tally, counts = set(self.names(planned)), Tally.zero(), dict[str, int]()
        for done in self.ledger.completions():
            if done.shard in names:
                tally += done.tally
                counts[f"{done.shard}.tar"] = done.tally.samples["kept"]
        failed = Counter(tally.failed)
        for later in planned:
            failed.subtract(later.retried)
        if planned[0].unreadable:
            failed["unreadable-row"] = planned[0].unreadable
        came, kept = planned[0].rows + planned[0].unreadable, tally.samples["kept"]
        if came != kept + failed.total() or min(failed.values(), default=0) < 0:
            raise RunError(
                f"{self.out}: {came} rows in, but {kept} kept + {failed.total()} failed. A shard was fetched again"
                " after what failed of it had been retried, so rows have two outcomes; download into another --out."
            )
        write_sizes(self.out, counts)
        return {
            "command": "download",
            "shards": str(self.out),
            "samples": {"in": came, "kept": kept, "failed": failed.total()},
            "success_rate": round(kept / came, 4),
            "enough": kept > 0 and kept >= options.min_success * came,
            "failed": {kind: count for kind, count in failed.most_common() if count},
            "repeated": dict(repeated.most_common(SHOWN)),
        }
