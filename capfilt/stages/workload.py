"""Where a command works that was given no address: small work in this process, more of it on a Ray of its own.

A Ray takes 8 to 30 seconds to start, which a selection of a few thousand texts does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from capfilt.cluster.session import Session, connect
from capfilt.cluster.worker_pool import Resources
from capfilt.data import parquet, shards
from capfilt.runs.ledger import Ledger
from capfilt.runs.progress import Progress
from capfilt.stages.runner import CommandOptions
from capfilt.storage.paths import StoragePath, map_concurrent
from capfilt.storage.remote_path import RemotePath

BY_SIZE = "by-size"
"""The address "local" for small work, "start" for more."""

MAX_SHARDS = 200
MAX_TEXTS = 50_000
"""Of a selection; with pictures of 30 kB it takes one core some 10 s."""
MAX_BYTES = 2 * 10**9
"""Of shards that are read."""


@dataclass(frozen=True)
class Workload:
    """How much there is to do; what was not counted is 0."""

    shards: int
    texts: int = 0
    bytes: int = 0

    @property
    def is_small(self) -> bool:
        """Whether this process is done with it before a Ray would have started and shared it out."""
        return self.shards <= MAX_SHARDS and self.texts <= MAX_TEXTS and self.bytes <= MAX_BYTES

    def __str__(self) -> str:
        """For a person."""
        counted = f"{self.texts:,} texts in " if self.texts else ""
        return f"{counted}{self.shards} shard{'s' * (self.shards != 1)}"


def of_selection(annotations: StoragePath, urls: Mapping[str, str]) -> Workload:
    """What selecting from shards (name -> url) takes, as the ledger of their annotations has it, else their tables."""
    if len(urls) > MAX_SHARDS:
        return Workload(len(urls))
    count = partial(_annotated, Ledger(annotations.parent, "annotate"), annotations)
    counted = map_concurrent(count, urls, isinstance(annotations, RemotePath))
    texts, sizes = zip(*counted, strict=True)
    return Workload(len(urls), sum(texts), sum(sizes))


def _annotated(ledger: Ledger, annotations: StoragePath, name: str) -> tuple[int, int]:
    """The texts of a shard, and its bytes where they are known."""
    done = ledger.read(ledger.path / f"{name}.json")
    if done is None:
        return parquet.num_rows(annotations / f"{name}.parquet"), 0
    texts = max(sum(done.tally.texts["in"].values()), done.tally.samples["in"])
    return texts, 0 if done.input is None else done.input.bytes


def of_shards(urls: list[str]) -> Workload:
    """What reading shards takes; their storage is asked for their sizes."""
    if len(urls) > MAX_SHARDS:
        return Workload(len(urls))
    return Workload(len(urls), bytes=sum(stat["size"] or 0 for stat in shards.stats(urls).values()))


def working_address(address: str, workload: Workload, options: CommandOptions, label: str, show: Progress) -> str:
    """The address to connect to; for `BY_SIZE` it says what was chosen if that is this process.

    Who says how many workers there should be, or how large, gets them.
    """
    if address != BY_SIZE:
        return address
    if options.workers or options.cpus is not None or not workload.is_small:
        return "start"
    show.say(f"{label}: {workload}: few enough for this process; --address start works with workers instead")
    return "local"


@dataclass(frozen=True)
class Place:
    """Where and how a command works, and what shows its progress."""

    address: str
    out: StoragePath
    """The run folder."""
    options: CommandOptions
    show: Progress

    @contextmanager
    def connect(self, label: str, workload: Workload | None = None) -> Iterator[tuple[Session, Resources]]:
        """Open a session and say what each worker in it has; `workload` is what `BY_SIZE` goes by."""
        address = self.address
        if workload is not None:
            address = working_address(address, workload, self.options, label, self.show)
        with connect(address, show=self.show) as session:
            yield session, self.options.resources(session)
