"""The hunt for the sample that kills its worker: its shard is halved until the sample is alone.

A job joins in by `divisible = True` and an `open` that answers with a `Splittable`. A kill may be chance, by a machine
that is short of memory, say: so a sample is left out only after it has killed twice when it was alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from capfilt.cluster.session import Session
from capfilt.cluster.worker_pool import Job, Resources, spread
from capfilt.data import shards
from capfilt.runs import quarantine
from capfilt.runs.ledger import Ledger, fingerprint
from capfilt.runs.metrics import ShardReport

TRIES = 2
"""How often a shard of such a job may kill its worker before the hunt begins, and a sample when it is alone."""

_FRUITLESS = 3  # hunts without a catch after which the shard itself has failed


@dataclass(frozen=True)
class Splittable:
    """What a job's `open` answers with if it can do a part of an item."""

    whole: Callable[[str], ShardReport]
    part: Callable[[str, int, int], int]
    """Do samples [start, stop) of the item as always, keep nothing, and return how many samples there are in all."""

    def __call__(self, item: str) -> ShardReport:
        return self.whole(item)


@dataclass(frozen=True)
class Probe:
    """A job whose items are parts of an item of another job: "start:stop:item"."""

    job: Job[Any]

    @property
    def name(self) -> str:
        return f"{self.job.name}-probe"

    def open(self) -> Callable[[str], int]:
        answer = self.job.open()

        def work(part: str) -> int:
            start, stop, item = part.split(":", 2)
            return answer.part(item, int(start), int(stop))  # type: ignore[attr-defined, no-any-return]

        return work


def version_of(identity: str, stat: Mapping[str, Any]) -> str:
    """The fingerprint under which deadly samples are known: their places are those of one version of a shard."""
    return fingerprint(identity, stat)


class Bisection:
    """What is known of the deadly items of one stage."""

    def __init__(self, session: Session, job: Any, ledger: Ledger, resources: Resources):
        self.session, self.job, self.ledger = session, job, ledger
        self.resources = resources.model_copy(update={"workers": 1})
        self.divisible = bool(getattr(job, "divisible", False)) and not session.local
        self._fruitless: Counter[str] = Counter()

    def worthwhile(self, item: str) -> bool:
        """Whether to look into an item that killed its workers, rather than to give it up."""
        return self.divisible and self._fruitless[item] < _FRUITLESS

    def find(self, item: str, shard: str, identity: str) -> None:
        """Find the sample that kills, and have it left out; where none does on its own, the shard has another try."""
        num = self._try(item, 0, 0)
        low, high = 0, num or 0
        while high - low > 1:
            middle = (low + high) // 2
            if self._try(item, low, middle) is None:
                high = middle
            else:
                low = middle
        if num and all(self._try(item, low, high) is None for _ in range(TRIES)):
            quarantine.mark(
                self.ledger, shard, version_of(identity, shards.stat(item)), low, f"{TRIES} times when it was alone"
            )
        else:
            self._fruitless[item] += 1

    def _try(self, item: str, start: int, stop: int) -> int | None:
        """The number of samples in an item, after doing a part of them; None where that killed the worker."""
        [end] = spread(self.session, Probe(self.job), [f"{start}:{stop}:{item}"], self.resources, tries=1)
        return None if end.deaths else end.result or 0
