"""Bisection of a shard that keeps killing its worker, down to the one sample that does it, which is then skipped.

A job takes part by `splittable = True` and an `open` that returns a `Splittable`. A worker may also die by chance, for
example on a machine that is short of memory: so a sample is skipped only after it has killed its worker twice alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from capfilt.cluster.session import Session
from capfilt.cluster.worker import Job
from capfilt.cluster.worker_pool import Resources, run_items
from capfilt.data import shards
from capfilt.runs import quarantine
from capfilt.runs.ledger import Ledger, fingerprint
from capfilt.runs.metrics import ShardReport
from capfilt.runs.usage import Meter

TRIES = 2
"""How often a shard may kill its worker before it is bisected, and a single sample before it is skipped."""

_MAX_BISECTIONS = 3  # of one shard that find no sample; after these the shard itself has failed


@dataclass(frozen=True)
class Splittable:
    """What a job's `open` returns if it can process a part of an item."""

    whole: Callable[[str], ShardReport]
    part: Callable[[str, int, int], int]
    """Process samples [start, stop) of the item as usual, write nothing, and return the item's number of samples."""
    expect: Callable[[str | None], None] = lambda _: None
    """Is told before each item which one will come after it, where that is known: its input may be read ahead."""
    close: Callable[[], None] = lambda: None
    """Let go of what was read ahead: no more items come."""

    def __call__(self, item: str) -> ShardReport:
        return self.whole(item)


@dataclass(frozen=True)
class Probe:
    """A job that processes parts of another job's items; each of its own items is "start:stop:item"."""

    job: Job[Any]

    @property
    def name(self) -> str:
        return f"{self.job.name}-probe"

    def open(self) -> Callable[[str], int]:
        process = self.job.open()

        def work(part: str) -> int:
            start, stop, item = part.split(":", 2)
            return process.part(item, int(start), int(stop))  # type: ignore[attr-defined, no-any-return]

        return work


def version_of(identity: str, stat: Mapping[str, Any]) -> str:
    """The fingerprint under which skipped samples are recorded: their positions hold for one version of a shard."""
    return fingerprint(identity, stat)


class Bisection:
    """Finds the samples of one stage that kill their workers."""

    def __init__(self, session: Session, job: Any, ledger: Ledger, resources: Resources, meter: Meter):
        self.session, self.job, self.ledger, self.meter = session, job, ledger, meter
        self.resources = resources.model_copy(update={"workers": 1})
        self.enabled = bool(getattr(job, "splittable", False)) and not session.local
        self._without_result: Counter[str] = Counter()

    def is_worthwhile(self, item: str) -> bool:
        """Whether to bisect an item that killed its workers, rather than count it as failed."""
        return self.enabled and self._without_result[item] < _MAX_BISECTIONS

    def run(self, item: str, shard: str, identity: str) -> None:
        """Find the sample that kills its worker and mark it to be skipped; if no single one does, the item may simply
        be tried again."""
        num = self._try(item, 0, 0)
        low, high = 0, num or 0
        while high - low > 1:
            middle = (low + high) // 2
            if self._try(item, low, middle) is None:
                high = middle
            else:
                low = middle
        if num and all(self._try(item, low, high) is None for _ in range(TRIES)):
            quarantine.add(
                self.ledger, shard, version_of(identity, shards.stat(item)), low, f"{TRIES} times when it was alone"
            )
        else:
            self._without_result[item] += 1

    def _try(self, item: str, start: int, stop: int) -> int | None:
        """Process samples [start, stop) of an item; returns its number of samples, None if the worker died."""
        part = f"{start}:{stop}:{item}"
        [end] = run_items(self.session, Probe(self.job), [part], self.resources, tries=1, meter=self.meter)
        return None if end.deaths else end.result or 0
