"""A seeded sample of the samples of shards: every sample of the shards that are read is as likely to be drawn.

Tars have no index, so to draw from a shard is to read it: of many shards some are drawn, each as likely as the others,
and what is drawn from them is clustered by shard, which the intervals of `estimate` take into account.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from capfilt.data import shards
from capfilt.data.sample import FailedSample, Sample

MAX_STATS = 1_000
"""Shards whose storage is asked for their sizes; of more, so many that are drawn."""
_BLOCK = 512
"""Bytes of which a tar is made: a member has one for its header, and its own bytes fill up whole ones."""


@dataclass(frozen=True)
class Draw:
    """What was drawn, and what is known of the whole."""

    urls: Sequence[str]
    """All shards."""
    items: Sequence[tuple[str, Sample | FailedSample]]
    """The drawn samples in random order, each with the URL of its shard."""
    counts: dict[str, int]
    """The samples that were read of each shard that was."""
    whole: bool
    """Whether these shards were read to their ends."""
    sizes: dict[str, int]
    """Bytes of shards, as far as their storage was asked and knows."""
    read_bytes: int
    """Bytes of what was read."""

    @property
    def is_census(self) -> bool:
        """Whether every shard was read to its end, so that the number of samples is known."""
        return self.whole and len(self.counts) == len(self.urls)

    @property
    def num_bytes(self) -> float | None:
        """Bytes of all shards; None where their storage does not know."""
        return sum(self.sizes.values()) * len(self.urls) / len(self.sizes) if self.sizes else None

    @property
    def num_samples(self) -> float:
        """The samples of all shards: counted, else by the bytes of all shards and of what was read."""
        count = sum(self.counts.values())
        if self.is_census:
            return count
        known = sum(self.sizes.get(url, 0) for url in self.counts) if self.whole else self.read_bytes
        if self.num_bytes is not None and known:
            return self.num_bytes * count / known
        return count * len(self.urls) / len(self.counts)


def draw(urls: Sequence[str], size: int, seed: int, max_shards: int, first: int | None = None) -> Draw:
    """Draw `size` samples, or all there are, from at most `max_shards` of the shards.

    `first`: read only so many samples at the beginning of each shard, for a quick look: what comes later in a shard is
    then never drawn. ShardError where a shard is not there, or its storage failed.
    """
    rng = random.Random(f"shards of {seed}")
    chosen = [urls[i] for i in sorted(rng.sample(range(len(urls)), min(max_shards, len(urls))))]
    asked = dict.fromkeys([*chosen, *rng.sample(urls, min(MAX_STATS, len(urls)))])
    sizes = {url: stat["size"] for url, stat in shards.stats(list(asked)).items() if stat["size"]}
    heap: list[tuple[int, int, str, Sample | FailedSample]] = []
    counts, num_bytes, whole = dict.fromkeys(chosen, 0), 0, True
    for url in chosen:
        for place, item in enumerate(islice(shards.read(url, extras=True), first)):
            counts[url] += 1
            num_bytes += _bytes(item)
            entry = (-_random(seed, shards.name(url), place), place, url, item)
            if len(heap) < size:
                heapq.heappush(heap, entry)
            elif entry[:3] > heap[0][:3]:
                heapq.heapreplace(heap, entry)
        whole = whole and (first is None or counts[url] < first)
    heap.sort(key=lambda entry: entry[:3], reverse=True)
    return Draw(urls, [(url, item) for *_, url, item in heap], counts, whole, sizes, num_bytes)


def _random(seed: int, shard: str, place: int) -> int:
    """64 random bits that belong to a place of a shard, whatever else is drawn."""
    text = f"{seed}\0{shard}\0{place}".encode("utf-8", "replace")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def _bytes(item: Sample | FailedSample) -> int:
    """About the bytes that a sample takes in a tar."""
    if isinstance(item, FailedSample):
        return _BLOCK
    members = (len(item.image), len(item.text.encode("utf-8", "replace")), len(repr(item.meta)))
    lengths = [*members, *map(len, item.extras.values())]
    return sum(_BLOCK + math.ceil(length / _BLOCK) * _BLOCK for length in lengths)
