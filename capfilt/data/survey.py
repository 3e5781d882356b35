"""A seeded sample of the samples of shards: every sample of the shards that are read is as likely to be drawn.

Tars have no index, so to draw from a shard is to read it: of many shards some are drawn, each as likely as the others,
and what is drawn from them is clustered by shard, which the intervals of `estimate` take into account.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from capfilt.data import shards
from capfilt.data.sample import FailedSample, Sample

MAX_STATS = 1_000
"""Shards whose storage is asked for their sizes; of more, so many that are drawn."""
_MEMBER = 512 + 256
"""Bytes of a tar beside a member's own: its header, and half a block of padding."""


@dataclass(frozen=True)
class Draw:
    """What was drawn, and what is known of the whole."""

    urls: tuple[str, ...]
    """All shards."""
    items: tuple[tuple[str, Sample | FailedSample], ...]
    """The drawn samples in random order, each with the URL of its shard."""
    counts: dict[str, int]
    """The samples of each shard that was read; of its beginning, where only that was."""
    whole: bool
    """Whether these shards were read to their ends."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of shards, as far as their storage was asked and knows."""
    read_bytes: int = 0
    """Bytes of what was read."""

    @property
    def is_census(self) -> bool:
        """Whether every shard was read to its end, so that the number of samples is known."""
        return self.whole and len(self.counts) == len(self.urls)

    @property
    def num_bytes(self) -> float | None:
        """Bytes of all shards; None where their storage does not know."""
        if not self.sizes:
            return None
        return sum(self.sizes.values()) * len(self.urls) / len(self.sizes)

    @property
    def num_samples(self) -> float:
        """The samples of all shards: counted, else by the bytes of all shards and those of a sample that was read."""
        count = sum(self.counts.values())
        if self.is_census or not count:
            return count
        known = sum(self.sizes.get(url, 0) for url in self.counts) if self.whole else self.read_bytes
        if self.num_bytes is not None and known:
            return self.num_bytes * count / known
        return count * len(self.urls) / len(self.counts)


def draw(urls: Sequence[str], size: int, seed: int, max_shards: int = 32, first: int | None = None) -> Draw:
    """Draw `size` samples, or all there are, from at most `max_shards` of the shards.

    Args:
        first: read only so many samples at the beginning of each shard, for a quick look: what comes later in a shard
            is then never drawn.

    Raises:
        ShardError: a shard is not there, or its storage failed.
    """
    rng = random.Random(f"shards of {seed}")
    chosen = sorted(rng.sample(range(len(urls)), min(max_shards, len(urls))))
    asked = sorted({*chosen, *rng.sample(range(len(urls)), min(MAX_STATS, len(urls)))})
    stats = shards.stats([urls[i] for i in asked])
    heap: list[tuple[int, str, int, Sample | FailedSample]] = []
    counts, num_bytes, whole = dict.fromkeys((urls[i] for i in chosen), 0), 0, True
    for url in counts:
        stream = shards.read(url, extras=True)
        for place, item in enumerate(stream if first is None else islice(stream, first)):
            counts[url] += 1
            num_bytes += _bytes(item)
            entry = (-_priority(seed, shards.name(url), place), url, place, item)
            if len(heap) < size:
                heapq.heappush(heap, entry)
            elif entry > heap[0]:
                heapq.heapreplace(heap, entry)
        whole = whole and (first is None or counts[url] < first)
    sizes = {url: stat["size"] for url, stat in stats.items() if stat["size"]}
    items = tuple((url, item) for _, url, _, item in sorted(heap, key=lambda entry: entry[:3], reverse=True))
    return Draw(tuple(urls), items, counts, whole, sizes, num_bytes)


def texts(items: Iterable[tuple[str, Sample | FailedSample]]) -> Iterator[tuple[str, str]]:
    """The texts of drawn samples that have something to read, each with its source."""
    for _, item in items:
        if isinstance(item, Sample):
            yield from ((caption["text"], caption["source"]) for caption in item.captions)


def _priority(seed: int, shard: str, place: int) -> int:
    """A random number of 64 bits that belongs to a place of a shard, whatever else is drawn."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{shard}\0{place}".encode("utf-8", "replace"), digest_size=8).digest(), "big")


def _bytes(item: Sample | FailedSample) -> int:
    """About the bytes that a sample takes in a tar."""
    if isinstance(item, FailedSample):
        return _MEMBER
    members = [item.image, item.text.encode("utf-8", "replace"), *item.extras.values()]
    return sum(len(member) + _MEMBER for member in members) + (len(repr(item.meta)) + _MEMBER if item.meta else 0)
