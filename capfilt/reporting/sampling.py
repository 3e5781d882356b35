"""The annotations of a round for the page: ten million of them are counted, a bounded number of images is sampled.

So the page opens at once however large the run is. Images are sampled by the hash of their uid: the same in
every round.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import compress

import numpy as np
import pyarrow as pa

import capfilt.data.annotations as tables
from capfilt.data import parquet
from capfilt.data.annotations import Annotation
from capfilt.data.duplicates import is_copy
from capfilt.data.policy import Rule, verdicts_of_table, whatever_threshold, with_scores
from capfilt.data.sample import SOURCES
from capfilt.data.shards.keys import MAX_KEY
from capfilt.evaluation.known_truth import Truth
from capfilt.printable import printable
from capfilt.reporting.counts import SCORE_RANGES, RoundCounts
from capfilt.reporting.page import json_for_script
from capfilt.runs.tally import no_text
from capfilt.stages.select import VERDICTS, read_verdicts, verdicts
from capfilt.storage.paths import StoragePath, map_concurrent
from capfilt.storage.remote_path import RemotePath

MAX_TEXTS = 20_000
"""Texts in the page, over all rounds."""
MAX_TEXTS_OF_IMAGE = 500
"""Texts of one image in the page; further ones are only counted."""
MAX_COUNTED = 10_000_000
"""Texts that are counted, over all rounds: some two minutes. Of more, those of shards drawn at random are."""
MAX_COUNTED_SHARDS = 20_000
MAX_SHARDS = 16
"""Shards from which images are sampled: each is read once more for its pictures. More where they are small."""
MAX_SMALL_SHARDS = 512
MAX_TEXT = 2_000
"""Characters of a text in the page."""
MAX_TEXT_IN_MEMORY = 20_000
"""Characters of a text that are kept in memory; a longer one cannot be labelled."""
MAX_PAGE_BYTES = 24_000_000
"""Bytes of the page without charts and tables; where texts are long it holds fewer pictures, then fewer texts."""
ROW_BYTES = 90
"""Bytes of a text's scores and list positions in the page, roughly."""
IMAGE_BYTES = 45
"""Bytes of an image's uid and shard in the page, roughly."""
_NO_LIMIT = 1 << 64
"""Above every hash."""
ImageId = tuple[str, str]
"""An image: the name of its shard, and its key."""


@dataclass(frozen=True)
class RoundSource:
    """Where the annotations of a round lie, and the policy that was applied to them."""

    number: int
    annotations: StoragePath
    dataset: StoragePath | None
    """The folder of the verdicts; None where there are none yet, and `score` and `threshold` are a first proposal."""
    rule: Rule
    score: str
    threshold: float
    """The threshold with which the page opens. A policy that only ranks has none: then every score reaches it."""
    select_command: str
    out_prefix: str
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=lambda: SCORE_RANGES)
    """The scores that the page has, each with the least and the greatest value: itm, itc and the policy's."""
    human_auc: Mapping[str, float] = field(default_factory=dict)
    """By score, the filter's AUC on human pairs against shuffled ones, where it was measured."""

    @property
    def movable(self) -> tuple[str, ...]:
        """The scores whose threshold the page moves: the policy's alone where more than its own threshold decides."""
        alone = self.rule.other_threshold is not None or self.score not in SCORE_RANGES
        return (self.score,) if alone else tuple(SCORE_RANGES)


@dataclass
class SampledImage:
    """An image of the page with its rows in a round, each with the reason why it is dropped whatever the threshold
    ("" = there is none; None = it is kept whatever that is)."""

    id: ImageId
    uid: str
    rows: list[tuple[Annotation, str | None]] = field(default_factory=list)
    full_lengths: dict[tuple[str, int], int] = field(default_factory=dict)
    """By source and candidate, the number of characters of a text that is not kept in memory in full."""

    @cached_property
    def num_bytes(self) -> int:
        """Bytes in the page, or a quarter of the characters in memory if that is more."""
        texts = (max(_bytes_in_page(row.text[:MAX_TEXT]), len(row.text) // 4) for row, _ in self.rows)
        return IMAGE_BYTES + _bytes_in_page(printable(self.id[1])) + sum(ROW_BYTES + text for text in texts)


def _bytes_in_page(text: str) -> int:
    return len(json_for_script(text).encode())


class RoundSample:
    """Counts and a sample of the annotations of one round, added shard by shard in bounded memory."""

    def __init__(
        self, source: RoundSource, max_texts: int, max_bytes: int = MAX_PAGE_BYTES, movable_threshold: bool = True
    ):
        """With `movable_threshold` the reasons that another threshold would change are left out of the sample."""
        self.source, self.max_texts, self.max_bytes = source, max_texts, max_bytes
        self.movable_threshold = movable_threshold
        self.counts = RoundCounts(source.ranges)
        self.num_rows = self.num_bytes = 0
        self._heap: list[tuple[int, ImageId, SampledImage]] = []
        self.limit = _NO_LIMIT
        """The smallest hash for which there was no room; no image above it is added later, or the sample would be
        biased."""

    def add(self, shard: str, truths: Mapping[str, Truth], sample: bool) -> None:
        """Count a shard; `truths` gives what is known of web texts by uid, `sample` whether its images may be in the
        page."""
        self.add_table(shard, *self.read(shard), truths, sample)

    def read(self, shard: str) -> tuple[pa.Table, Sequence[str]]:
        """The annotations of a shard, and why each is dropped ("" = kept)."""
        path = self.source.dataset / f"{shard}.parquet" if self.source.dataset else None
        if path is not None and path.is_file():
            table = read_verdicts(path)
            whys = table.column("why").to_pylist()
            return table.drop([column.name for column in VERDICTS]), whys
        table = tables.read(self.source.annotations / f"{shard}.parquet")
        table = with_scores(table, self.source.annotations, shard, self.source.rule)
        has_copies = any(map(is_copy, table["reason"].unique().to_pylist()))
        at_once = None if has_copies else verdicts_of_table(table, self.source.rule)
        return table, verdicts(list(tables.rows(table)), self.source.rule) if at_once is None else at_once

    def add_table(
        self, shard: str, table: pa.Table, whys: Sequence[str], truths: Mapping[str, Truth], sample: bool
    ) -> None:
        """Count what `read` gave of a shard."""
        self.counts.add(table, whys, truths)
        if sample:
            for image in self._images(shard, *self._below_limit(shard, table, whys)):
                self._add_to_sample(image)

    def _below_limit(self, shard: str, table: pa.Table, whys: Sequence[str]) -> tuple[pa.Table, Sequence[str]]:
        """The rows of those images for which there may be room: of a large run, few rows are converted."""
        if self.limit == _NO_LIMIT:
            return table, whys
        keys, uids = table.column("key").to_pylist(), table.column("uid").to_pylist()
        first = dict(zip(reversed(keys), reversed(uids), strict=True))  # an image has the uid of its first row
        chosen = {
            key: random_rank(SampledImage((shard, printable(key, MAX_KEY)), uid)) < self.limit
            for key, uid in first.items()
        }
        mask = [chosen[key] for key in keys]
        return table.filter(pa.array(mask, pa.bool_())), list(compress(whys, mask))

    def _images(self, shard: str, table: pa.Table, whys: Sequence[str]) -> Iterator[SampledImage]:
        images: dict[str, SampledImage] = {}
        for row, why in zip(tables.rows(table), whys, strict=True):
            if row.status == "ok" and no_text(row.reason):
                continue  # counted by annotate; there is nothing to show
            key = printable(row.key, MAX_KEY)  # differs from the row's key only where no picture has it
            image = images.setdefault(key, SampledImage((shard, key), row.uid))
            if len(image.rows) == MAX_TEXTS_OF_IMAGE:
                continue
            whatever = whatever_threshold(row, why, self.source.rule) if self.movable_threshold else why
            if len(row.text) > MAX_TEXT_IN_MEMORY:
                image.full_lengths[row.source, row.candidate] = len(row.text)
                row = replace(row, text=row.text[:MAX_TEXT_IN_MEMORY])
            image.rows.append((row, whatever))
        for image in images.values():  # the web's text first, as in the paper's figures
            image.rows.sort(key=lambda entry: (SOURCES.index(entry[0].source), entry[0].candidate))
            yield image

    def _add_to_sample(self, image: SampledImage) -> None:
        """Keep the images of the smallest hashes: a uniform sample, and the same in each round."""
        rank = random_rank(image)
        if rank >= self.limit:
            return
        heapq.heappush(self._heap, (-rank, image.id, image))
        self.num_rows += len(image.rows)
        self.num_bytes += image.num_bytes
        while (self.num_rows > self.max_texts or self.num_bytes > self.max_bytes) and len(self._heap) > 1:
            largest, _, removed = heapq.heappop(self._heap)
            self.num_rows -= len(removed.rows)
            self.num_bytes -= removed.num_bytes
            self.limit = -largest

    @property
    def opening(self) -> tuple[str, float]:
        """The score and the threshold with which the page opens: the policy's. Before there is one, and where the
        filter does not give that score, the median of the other one."""
        score, threshold = self.source.score, self.source.threshold
        if self.source.dataset is None and self.counts.median(score) is None:
            for other in self.source.ranges:
                if (median := self.counts.median(other)) is not None:
                    return other, round(median, 4)
        return score, threshold

    @property
    def has_all(self) -> bool:
        """Whether every image is in the sample."""
        return self.limit == _NO_LIMIT

    @property
    def images(self) -> list[SampledImage]:
        return [image for _, _, image in sorted(self._heap, key=lambda entry: (-entry[0], entry[1]))]


def random_rank(image: SampledImage) -> int:
    """The rank of an image in the random order: a hash of its uid, or of its shard and key where it has none."""
    name = image.uid or "/".join(image.id)
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class DrawnShards:
    """Of all shards of a run those whose annotations are counted, and of these the ones whose images may be shown."""

    counted: list[str]
    """Sorted."""
    sampled: set[str]
    total: int

    @property
    def all_counted(self) -> bool:
        """Whether every shard is counted."""
        return len(self.counted) == self.total


def draw_shards(sources: Sequence[RoundSource]) -> DrawnShards:
    """All shards where they are few, else as many of them as the limits allow, in an order that their names decide."""
    names = {name for source in sources for name in tables.shards_in(source.annotations)}
    first = in_random_order(names)[:MAX_COUNTED_SHARDS]
    sizes = np.cumsum([0, *map_concurrent(partial(_num_rows, sources), first, any_remote(sources))])
    counted = max(1, int(np.searchsorted(sizes, MAX_COUNTED, side="right")) - 1)
    shown = max(MAX_SHARDS, min(MAX_SMALL_SHARDS, int(np.searchsorted(sizes, 2 * MAX_TEXTS))))
    return DrawnShards(sorted(first[:counted]), set(first[: min(shown, counted)]), len(names))


def in_random_order(names: Iterable[str]) -> list[str]:
    """Names of shards in an order that looks random and that the names alone decide."""
    return sorted(names, key=lambda name: hashlib.blake2b(name.encode("utf-8", "replace")).digest())


def _num_rows(sources: Sequence[RoundSource], name: str) -> int:
    """The texts of a shard over all rounds that have it, from the ends of its tables."""
    paths = (source.annotations / f"{name}.parquet" for source in sources)
    return sum(parquet.num_rows(path) for path in paths if path.is_file())


def any_remote(sources: Sequence[RoundSource]) -> bool:
    """Whether annotations of a round lie on a store."""
    return any(isinstance(source.annotations, RemotePath) for source in sources)
