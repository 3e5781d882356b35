"""A shard as a worker reads it, and the shard after it, whose first pictures are decoded while this one is computed.

The next shard begins to be read when this one was read to its end, so there are never more batches in memory than
`inference.batches` says of each of the two. What goes wrong with a shard is raised when its own pictures are asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from capfilt.data import shards
from capfilt.data.loading.prefetch import Prefetched
from capfilt.data.sample import FailedSample, Sample, skip_positions
from capfilt.data.shards.members import MemberCounts
from capfilt.runs import quarantine
from capfilt.runs.ledger import Ledger
from capfilt.stages.bisect import version_of

if TYPE_CHECKING:
    from capfilt.inference.batches import Pictures

Decode = Callable[["ShardReading", Iterable[Sample | FailedSample]], Iterator["Pictures"]]
"""Makes batches of what is read of a shard; samples that kill workers are not among it."""


class ShardReading:
    """A shard that is being read, from now on, in a thread of its own."""

    def __init__(self, job: Any, url: str, decode: Decode, at_end: Callable[[], None]):
        """`job`: a ShardsJob. `at_end` is called in the thread when all is read."""
        self.job, self.url, self._decode, self._at_end = job, url, decode, at_end
        self.identity = ""
        self.members = MemberCounts()
        self.beside: list[Any] = []
        """What else `decode` finds in the shard."""
        self.digest = shards.Digest()
        self.is_read = False
        self.batches: Prefetched[Pictures] = Prefetched(self._read(), depth=1)

    def _read(self) -> Iterator[Pictures]:
        self.identity = self.job.identity(self.url)
        stat = shards.stat(self.url)
        self.digest = shards.Digest(stat["version"])
        name, ledger = self.job.shard_name(self.url), Ledger(self.job.out, self.job.name)
        deadly = quarantine.read(ledger, name, version_of(self.identity, stat))
        read = shards.read(self.url, self.digest, self.members)
        yield from self._decode(self, skip_positions(read, deadly))
        self.is_read = True
        self._at_end()


class ReadAhead:
    """The shard that a worker is at, and the one that it will probably be given next."""

    def __init__(self, job: Any, decode: Decode):
        self._job, self._decode = job, decode
        self._lock = threading.Lock()
        self._expected: str | None = None
        self._now: ShardReading | None = None
        self._next: ShardReading | None = None

    def expect(self, url: str | None) -> None:
        """Say which shard will come after the one that is asked for now; None: nobody knows."""
        self._expected = url

    @contextmanager
    def shard(self, url: str) -> Iterator[ShardReading]:
        """A shard, of which more or less is read by now."""
        if self._next is not None and self._next.url != url:
            self.close()
        with self._lock:  # the thread that reads may be done at once, and begin the next one
            now = self._now = self._next or self._open(url)
            self._next = None
        try:
            self._begin_next()
            yield now
        finally:
            now.batches.close()
            self._now = None

    def close(self) -> None:
        """Let go of what was read ahead, and wait for its threads."""
        begun, self._next = self._next, None
        if begun is not None:
            begun.batches.close()

    def _begin_next(self) -> None:
        with self._lock:
            if self._now is None or not self._now.is_read or self._next is not None:
                return
            if self._expected not in (None, self._now.url):
                self._next, self._expected = self._open(self._expected), None

    def _open(self, url: str) -> ShardReading:
        return ShardReading(self._job, url, self._decode, self._begin_next)
