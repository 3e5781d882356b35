"""The gallery of a report: annotations of a round counted whole and sampled for the page, with thumbnails.

Counts are over every text. The page itself holds a bounded number of texts and pictures, so that it opens at once
however large the run: images drawn at random by the hash of their uid, the same ones in every round.
"""

from __future__ import annotations

import base64
import hashlib
import heapq
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

import capfilt.data.annotations as tables
from capfilt.data import shards
from capfilt.data.annotations import Annotation
from capfilt.data.images import decode as images
from capfilt.data.labels import Label
from capfilt.data.policy import Rule, failure
from capfilt.data.sample import SOURCES, Sample
from capfilt.data.shards.members import MAX_KEY
from capfilt.errors import ImageError
from capfilt.evaluation.evaluate import MAX_KINDS, Truth
from capfilt.evaluation.metrics.captioning import diversity
from capfilt.printable import printable
from capfilt.reporting.charts import Histogram
from capfilt.reporting.page import COLUMNS, MAX_WORDS, Look, embedded
from capfilt.runs.tally import MAX_REASONS, NO_TEXT, OTHER
from capfilt.stages.select import VERDICT_SCHEMA
from capfilt.stages.select import verdicts as judged
from capfilt.storage.paths import StoragePath

MAX_TEXTS = 20_000
"""Texts in the page, over all rounds."""
MAX_OF_IMAGE = 500
"""Texts of one image in the page; the rest is counted."""
MAX_SHARDS = 16
"""Shards from which images of the page are drawn: each is read once more for its pictures."""
MAX_THUMBS = 2_400
MAX_THUMB_BYTES = 12_000_000
"""Of all thumbnails; as base64 they take a third more."""
THUMB = 128
"""Pixels of a thumbnail's longer side."""
MAX_TEXT = 400
"""Characters of a text in the page."""
MAX_HELD = 20_000
"""Characters of a text that are held in memory; a longer one cannot be labelled."""
MAX_PAGE = 24_000_000
"""Bytes of the page without charts and tables; where texts are long, fewer pictures are in it, then fewer texts."""
ROW = 90
"""Bytes of a text's scores and places in the page, roughly."""
MAX_DIVERSITY = 2_000
"""Texts of a source whose n-grams are counted: distinct shares can be compared for equal numbers only."""
FINE = 1_000
"""Bins of a score while counting; a histogram has about FINE / 20 over the part that is used."""
LAYERS = ("wrong", "right", "unknown")
SPANS = {"itm": (0.0, 1.0), "itc": (-1.0, 1.0)}

Spot = tuple[str, str]
"""An image: its shard and key."""


@dataclass(frozen=True)
class Round:
    """Where the annotations of a round lie, and how they were judged."""

    number: int
    annotations: StoragePath
    dataset: StoragePath | None
    """Of the verdicts; None where there are none yet, and `score` and `threshold` are what the page begins with."""
    rule: Rule
    score: str
    threshold: float
    """Where the page begins. A policy that only ranks has none: then it is below every score."""
    select: str
    out: str


@dataclass
class Drawn:
    """An image of the page with its rows in a round, and why each is out whatever the threshold ("" = it is not)."""

    place: Spot
    uid: str
    rows: list[tuple[Annotation, str]] = field(default_factory=list)
    cut: dict[tuple[str, int], int] = field(default_factory=dict)
    """By source and candidate, the full number of characters of a text that is held cut short."""

    @cached_property
    def size(self) -> int:
        """Bytes in the page, or a quarter of the characters in memory if those are more."""
        texts = (max(_written(row.text[:MAX_TEXT]), len(row.text) // 4) for row, _ in self.rows)
        return _written(printable(self.place[1])) + sum(ROW + text for text in texts)


def _written(text: str) -> int:
    return len(embedded(text).encode())


class Counted:
    """The annotations of one round, added shard by shard in bounded memory."""

    def __init__(self, round_: Round, max_texts: int, max_bytes: int = MAX_PAGE):
        self.round, self.max_texts, self.max_bytes = round_, max_texts, max_bytes
        self.scores = {
            (score, source): {layer: np.zeros(FINE, np.int64) for layer in LAYERS}
            for score in SPANS
            for source in SOURCES
        }
        self.lengths = {source: np.zeros(MAX_WORDS + 1, np.int64) for source in SOURCES}
        self.totals = dict.fromkeys(SOURCES, 0)
        self.heap: list[tuple[int, Spot, Drawn]] = []
        self.num_rows = self.num_bytes = 0
        self.full = 1 << 64
        """The smallest hash that there was no room for; none above it comes in later, or the sample has gaps."""

    def add(self, shard: str, known: Mapping[str, Truth], drawn: bool) -> None:
        """Count a shard; `drawn`: its images may be in the page."""
        verdicts = self.round.dataset / f"{shard}.parquet" if self.round.dataset else None
        if verdicts is not None and verdicts.is_file():
            table = tables.read(verdicts, VERDICT_SCHEMA)
            whys = table.column("why").to_pylist()
            table = table.select(tables.SCHEMA.names)
        else:
            table = tables.read(self.round.annotations / f"{shard}.parquet")
            whys = judged(list(tables.rows(table)), self.round.rule)
        self._count(table, known)
        if drawn:
            for image in self._images(shard, table, whys):
                self._draw(image)

    def _count(self, table: pa.Table, known: Mapping[str, Truth]) -> None:
        is_text = pc.not_equal(table.column("reason"), NO_TEXT)
        ok = table.filter(pc.and_(pc.equal(table.column("status"), "ok"), is_text))
        trimmed = pc.utf8_trim_whitespace(ok.column("text"))
        split = pc.list_value_length(pc.utf8_split_whitespace(trimmed)).to_numpy()
        words = np.where(pc.equal(trimmed, "").to_numpy(), 0, split)  # "" splits into one part
        sources, uids = ok.column("source").to_numpy(), ok.column("uid").to_pylist()
        firsts = ok.column("candidate").to_numpy() == 0
        for source in SOURCES:
            own = sources == source
            self.totals[source] += int(own.sum())
            self.lengths[source] += np.bincount(np.minimum(words[own], MAX_WORDS), minlength=MAX_WORDS + 1)
        layer = np.full(len(uids), LAYERS.index("unknown"))
        if known:
            told = (
                known.get(uid) if first and web else None
                for uid, first, web in zip(uids, firsts, sources == "web", strict=True)
            )
            layer = np.array([2 if truth is None else int(truth[0]) for truth in told], dtype=int)
        for (score, source), counts in self.scores.items():
            values = ok.column(score).to_numpy().astype(np.float64)
            there = (sources == source) & ~np.isnan(values)
            low, high = SPANS[score]
            bins = np.clip(((values[there] - low) / (high - low) * FINE).astype(int), 0, FINE - 1)
            for number, name in enumerate(LAYERS):
                counts[name] += np.bincount(bins[layer[there] == number], minlength=FINE)

    def _images(self, shard: str, table: pa.Table, whys: Sequence[str]) -> Iterator[Drawn]:
        # The page moves one threshold; where there is another, on the other score, that one stays.
        moved = SPANS if self.round.rule.other_threshold is None else (self.round.score,)
        by_score = {f"{score} below threshold" for score in moved} | {f"no {score} score" for score in moved}
        found: dict[str, Drawn] = {}
        for row, why in zip(tables.rows(table), whys, strict=True):
            if row.status == "ok" and row.reason == NO_TEXT:
                continue  # counted when annotated; there is nothing to show
            key = printable(row.key, MAX_KEY)  # another than the row's only where no picture has it
            own = found.setdefault(key, Drawn((shard, key), row.uid))
            if len(own.rows) == MAX_OF_IMAGE:
                continue
            if len(row.text) > MAX_HELD:
                own.cut[row.source, row.candidate] = len(row.text)
                row = replace(row, text=row.text[:MAX_HELD])
            own.rows.append((row, "" if why in by_score else why))
        for image in found.values():  # the web's text first, as in the paper's figures
            image.rows.sort(key=lambda entry: (SOURCES.index(entry[0].source), entry[0].candidate))
            yield image

    def _draw(self, image: Drawn) -> None:
        """Keep the images of the smallest hashes: a uniform sample, and the same in each round."""
        place = chance(image)
        if place >= self.full:
            return
        heapq.heappush(self.heap, (-place, image.place, image))
        self.num_rows += len(image.rows)
        self.num_bytes += image.size
        while (self.num_rows > self.max_texts or self.num_bytes > self.max_bytes) and len(self.heap) > 1:
            largest, _, left_out = heapq.heappop(self.heap)
            self.num_rows -= len(left_out.rows)
            self.num_bytes -= left_out.size
            self.full = -largest

    @property
    def images(self) -> list[Drawn]:
        """The images drawn, in random order."""
        return [image for _, _, image in sorted(self.heap, key=lambda entry: (-entry[0], entry[1]))]

    def histograms(self) -> dict[str, dict[str, Histogram]]:
        """By score and source, over the part of the scale that any text is on."""
        found: dict[str, dict[str, Histogram]] = {}
        for score, (low, high) in SPANS.items():
            own = {source: self.scores[score, source] for source in SOURCES}
            used = np.flatnonzero(sum(counts for layers in own.values() for counts in layers.values()))
            if not used.size:
                continue
            # To tenths of the scale outwards, so that bins are equal and edges round.
            step = FINE // 20
            start, end = used[0] // step * step, -(-(used[-1] + 1) // step) * step
            merged = max(1, (end - start) // 50)
            first, last = (low + (high - low) * int(place) / FINE for place in (start, end))
            found[score] = {
                source: Histogram(first, last, _merged(layers, slice(start, end), merged))
                for source, layers in own.items()
                if self.totals[source]
            }
        return found


def chance(image: Drawn) -> int:
    """Where an image stands in the random order: a hash of its uid, or of its place where it could not be read."""
    name = image.uid or "/".join(image.place)
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=8).digest(), "big")


def chosen_shards(names: Iterable[str], limit: int = MAX_SHARDS) -> set[str]:
    """The shards whose images may be in the page: all of a few, else so many at random."""
    return set(
        heapq.nsmallest(limit, names, key=lambda name: hashlib.blake2b(name.encode("utf-8", "replace")).digest())
    )


def _merged(layers: Mapping[str, np.ndarray], part: slice, size: int) -> dict[str, list[int]]:
    merged = {
        name: np.add.reduceat(counts[part], np.arange(0, part.stop - part.start, size))
        for name, counts in layers.items()
    }
    return {name: counts.tolist() for name, counts in merged.items() if counts.any()}


# ---- columns of the page ----


class Words:
    """The lists that the page's columns point into."""

    def __init__(self) -> None:
        self.reasons: dict[tuple[str, str, bool], int] = {}
        self.kinds: dict[str, int] = {}

    def reason(self, row: Annotation, fixed: str) -> int:
        """The place of a reason that holds whatever the threshold, -1 for none."""
        if not fixed:
            return -1
        told = (printable(fixed), failure(fixed), row.status == "failed")
        if told not in self.reasons and len(self.reasons) >= MAX_REASONS:
            told = (OTHER, OTHER, row.status == "failed")
        return self.reasons.setdefault(told, len(self.reasons))

    def kind(self, truth: Truth | None) -> int:
        """The place of a kind of wrong text, -1 for none."""
        if truth is None or truth[0]:
            return -1
        kind = truth[1] if truth[1] in self.kinds or len(self.kinds) < MAX_KINDS else OTHER
        return self.kinds.setdefault(kind, len(self.kinds))


def look(
    counted: Counted,
    places: Mapping[Spot, int],
    known: Mapping[str, Truth],
    labels: Mapping[tuple[str, str], Label],
    words: Words,
) -> Look:
    """A round as the page has it; `places` gives the number of each image, in random order."""
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    cut: dict[int, int] = {}
    for image in counted.images:
        for row, fixed in image.rows:
            truth = known.get(row.uid) if row.source == "web" and row.candidate == 0 else None
            label = labels.get((row.uid, row.text))
            if len(row.text) > MAX_TEXT:
                cut[len(columns["text"])] = image.cut.get((row.source, row.candidate), len(row.text))
            values = (
                places[image.place],
                SOURCES.index(row.source),
                row.candidate,
                row.text[:MAX_TEXT],
                _digits(row.itm),
                _digits(row.itc),
                words.reason(row, fixed),
                -1 if truth is None else int(truth[0]),
                words.kind(truth),
                label_code(label),
            )
            for name, value in zip(COLUMNS, values, strict=True):
                columns[name].append(value)
    round_ = counted.round
    return Look(
        round=round_.number,
        score=round_.score,
        threshold=round_.threshold,
        select=round_.select,
        out=round_.out,
        totals={source: count for source, count in counted.totals.items() if count},
        histograms=counted.histograms(),
        lengths={source: counts.tolist() for source, counts in counted.lengths.items()},
        diversity=_diversity(counted.images),
        texts=columns,
        cut=cut,
    )


def label_code(label: Label | None) -> int:
    """A label as the page has it: -1 none, 1 right, 0 wrong, and 2 more where it was not given at random."""
    if label is None or label.verdict == "none":
        return -1
    return int(label.verdict == "right") + (0 if label.at_random else 2)


def _digits(score: float | None) -> float | None:
    """Nine digits: enough to find the 32-bit number again."""
    return None if score is None else float(f"{score:.9g}")


def _diversity(drawn: Sequence[Drawn]) -> dict[str, dict[str, float]]:
    found = {}
    for source in SOURCES:
        own = [row.text for image in drawn for row, _ in image.rows if row.source == source and row.status == "ok"]
        if own := own[:MAX_DIVERSITY]:
            found[source] = {**diversity(own), "texts": float(len(own))}
    return found


# ---- thumbnails ----


def wanted(rounds: Sequence[Counted], limit: int = MAX_THUMBS) -> set[Spot]:
    """The images that get a thumbnail: half of them the closest calls of each round, the rest at random."""
    drawn = {image.place: None for counted in rounds for image in counted.images}
    if len(drawn) <= limit:
        return set(drawn)
    chosen: set[Spot] = set()
    for counted in rounds:
        close = sorted(counted.images, key=lambda image: _closeness(image, counted.round))
        chosen |= {image.place for image in close[: limit // (2 * len(rounds))]}
    for place in drawn:
        if len(chosen) == limit:
            break
        chosen.add(place)
    return chosen


def _closeness(image: Drawn, round_: Round) -> float:
    scores = (row.itm if round_.score == "itm" else row.itc for row, _ in image.rows)
    return min((abs(score - round_.threshold) for score in scores if score is not None), default=np.inf)


def room(rounds: Sequence[Counted]) -> int:
    """Bytes that thumbnails may have beside the texts of the page."""
    texts = sum(counted.num_bytes for counted in rounds)
    return max(0, min(MAX_THUMB_BYTES, (MAX_PAGE - texts) * 3 // 4))


def thumbnails(urls: Mapping[str, str], places: set[Spot], max_bytes: int = MAX_THUMB_BYTES) -> dict[Spot, str]:
    """Thumbnails as data: URLs; a picture that cannot be decoded has none. Each shard is read as far as it must be."""
    found: dict[Spot, str] = {}
    left = max_bytes
    for shard in sorted({shard for shard, _ in places if shard in urls}):
        keys = {key for name, key in places if name == shard}
        for item in shards.read(urls[shard]):
            if not keys or left <= 0:
                break
            if isinstance(item, Sample) and item.key in keys:
                keys.remove(item.key)
                if (small := thumbnail(item.image)) is not None:
                    left -= len(small)
                    found[shard, item.key] = f"data:image/webp;base64,{base64.b64encode(small).decode()}"
    return found


def thumbnail(data: bytes) -> bytes | None:
    """A picture as a small WebP, None where it is none that can be decoded."""
    try:
        picture = images.decode(data)
    except ImageError:
        return None
    picture.thumbnail((THUMB, THUMB), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    # A picture that was small before must not become worse.
    picture.save(buffer, "WEBP", quality=60 if max(picture.size) == THUMB else 90, method=2)
    return buffer.getvalue()
