"""The gallery of the page: sampled images of every round, their texts with scores, truth and labels, and thumbnails."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from capfilt.data.annotations import Annotation
from capfilt.data.labels import Label
from capfilt.data.policy import Rule, failure_class
from capfilt.data.sample import SOURCES
from capfilt.evaluation.known_truth import MAX_KINDS, Truth, truths
from capfilt.evaluation.metrics.captioning import diversity
from capfilt.printable import printable
from capfilt.reporting.page_data import COLUMNS, AnnotatedRound
from capfilt.reporting.sampling import (
    MAX_PAGE_BYTES,
    MAX_TEXT,
    MAX_TEXTS,
    DrawnShards,
    ImageId,
    RoundSample,
    RoundSource,
    SampledImage,
    any_remote,
    draw_shards,
    random_rank,
)
from capfilt.reporting.thumbnails import byte_budget, images_to_show, thumbnails
from capfilt.runs.ledger import Ledger
from capfilt.runs.stage_status import read_status
from capfilt.runs.tally import MAX_REASONS, OTHER, Tally
from capfilt.storage.paths import map_concurrent

MAX_DIVERSITY = 2_000
"""Texts of a source whose n-grams are counted: shares of distinct n-grams are comparable for equal numbers only."""


class ColumnLists:
    """The lists into which columns of the page point: each reason and each kind once."""

    def __init__(self) -> None:
        self.reasons: dict[tuple[str, str, bool], int] = {}
        self.kinds: dict[str, int] = {}

    def reason(self, row: Annotation, why: str | None) -> int:
        """The position of a reason that holds whatever the threshold, -1 for none, -2 for a text kept anyhow."""
        if not why:
            return -1 if why is not None else -2
        entry = (printable(why), failure_class(why), row.status == "failed")
        if entry not in self.reasons and len(self.reasons) >= MAX_REASONS:
            entry = (OTHER, OTHER, row.status == "failed")
        return self.reasons.setdefault(entry, len(self.reasons))

    def kind(self, truth: Truth | None) -> int:
        """The position of a kind of wrong text, -1 for none."""
        if truth is None or truth[0]:
            return -1
        kind = truth[1] if truth[1] in self.kinds or len(self.kinds) < MAX_KINDS else OTHER
        return self.kinds.setdefault(kind, len(self.kinds))


TextKey = tuple[str, str, str]
"""(uid, source, text in full) of a text in the page; the uid is "" where the picture could not be read, or where the
text is too long to be kept in full."""


@dataclass(frozen=True)
class Gallery:
    """What the page shows of the annotations of a run."""

    rounds: list[AnnotatedRound]
    images: list[tuple[str, str | None]]
    """Key and thumbnail of every image, in random order."""
    identities: list[tuple[str, str]]
    """Shard and uid of each of them."""
    lists: ColumnLists
    texts: list[list[TextKey]]
    """Which text each row of a round is."""
    notes: list[str]
    """What of the run is in the page."""


def make_gallery(
    sources: Sequence[RoundSource], urls: Mapping[str, str], labels: Mapping[tuple[str, str], Label]
) -> Gallery:
    """Read the annotations of every round, and the pictures of the sampled images from the shards `urls` (by name)."""
    lists = ColumnLists()
    if not sources:
        return Gallery([], [], [], lists, [], [])
    drawn = draw_shards(sources)
    rounds = [RoundSample(source, MAX_TEXTS // len(sources), MAX_PAGE_BYTES // len(sources)) for source in sources]
    truths_by_uid: dict[str, Truth] = {}

    def load(name: str) -> tuple[str, dict[str, Truth], list[tuple[RoundSample, pa.Table, Sequence[str]]]]:
        present = (each for each in rounds if (each.source.annotations / f"{name}.parquet").is_file())
        return name, truths(urls[name]) if name in urls else {}, [(each, *each.read(name)) for each in present]

    for name, known, tables in map_concurrent(load, drawn.counted, any_remote(sources)):
        for sample, table, whys in tables:
            sample.add_table(name, table, whys, known, name in drawn.sampled)
        if name in drawn.sampled:
            truths_by_uid |= known
    totals = [None if drawn.all_counted else _recorded_total(source) for source in sources]
    images = {image.id: image for sample in rounds for image in sample.images}
    in_order = sorted(images.values(), key=lambda image: (random_rank(image), image.id))
    positions = {image.id: position for position, image in enumerate(in_order)}
    small = thumbnails(urls, images_to_show(rounds), byte_budget(rounds))
    return Gallery(
        rounds=[
            annotated_round(sample, positions, truths_by_uid, labels, lists, total)
            for sample, total in zip(rounds, totals, strict=True)
        ],
        images=[(key, small.get((shard, key))) for shard, key in positions],
        identities=[(shard, images[shard, key].uid) for shard, key in positions],
        lists=lists,
        texts=[_text_keys(sample) for sample in rounds],
        notes=list(_notes(rounds, drawn, (len(small), len(positions)))),
    )


def _text_keys(sample: RoundSample) -> list[TextKey]:
    return [
        ("" if (row.source, row.candidate) in image.full_lengths else row.uid, row.source, row.text)
        for image in sample.images
        for row, _ in image.rows
    ]


def _recorded_total(source: RoundSource) -> Tally | None:
    """What the ledger of `select` has of all shards of a round; None before there are verdicts."""
    return None if source.dataset is None else read_status(Ledger(source.dataset.parent, "select")).tally


def _notes(rounds: Sequence[RoundSample], drawn: DrawnShards, num_images: tuple[int, int]) -> Iterator[str]:
    """What of the run is in the page; `num_images` is (with a thumbnail, all)."""
    total = sum(sum(sample.counts.totals.values()) for sample in rounds)
    shown, num_sampled = sum(sample.num_rows for sample in rounds), len(drawn.sampled)
    of = f" of {num_sampled} of the {drawn.total} shards" if num_sampled < drawn.total else ""
    held = f"those of {num_images[1]:,} images drawn at random{of}"
    gallery = f"The gallery and the live figures hold {shown:,} of them: {held}."
    if not drawn.all_counted:
        decided = any(sample.source.dataset is not None for sample in rounds)
        yield (
            f"Histograms, medians and lengths are of {total:,} texts: those of {len(drawn.counted):,} of the"
            f" {drawn.total:,} shards, drawn at random. {gallery}"
            + " What was kept and dropped is counted over all shards."
            * decided
        )
    elif shown < total:
        yield f"Tables and histograms count all {total:,} texts. {gallery}"
    else:
        yield f"Tables, histograms, live figures and gallery hold all {total:,} texts."
    if num_images[0] < num_images[1]:
        yield (
            f"{num_images[0]:,} of {num_images[1]:,} images have a thumbnail: the closest calls, and others at random."
        )


def annotated_round(
    sample: RoundSample,
    positions: Mapping[ImageId, int],
    truths: Mapping[str, Truth],
    labels: Mapping[tuple[str, str], Label],
    lists: ColumnLists,
    recorded: Tally | None = None,
) -> AnnotatedRound:
    """A round as the page has it.

    `positions` gives the position of each image in the page, `truths` what is known of web texts by uid, `labels` the
    labels by (uid, text). `recorded` is what the ledger has of all shards, where not all were counted here.
    """
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    columns |= {name: [] for name in sample.source.ranges if name not in columns}
    full_lengths: dict[int, int] = {}
    for image in sample.images:
        for row, why in image.rows:
            truth = truths.get(row.uid) if row.source == "web" and row.candidate == 0 else None
            if len(row.text) > MAX_TEXT:
                length = image.full_lengths.get((row.source, row.candidate), len(row.text))
                full_lengths[len(columns["text"])] = length
            values = (
                positions[image.id],
                SOURCES.index(row.source),
                row.candidate,
                row.text[:MAX_TEXT],
                _nine_digits(row.itm),
                _nine_digits(row.itc),
                lists.reason(row, why),
                -1 if truth is None else int(truth[0]),
                lists.kind(truth),
                label_code(labels.get((row.uid, row.text))),
            )
            further = (_nine_digits(row.score(name)) for name in list(columns)[len(COLUMNS) :])
            for name, value in zip(columns, (*values, *further), strict=True):
                columns[name].append(value)
    source, (score, threshold) = sample.source, sample.opening
    totals = sample.counts.totals if recorded is None else recorded.num_scored()
    filters = {row.filter for image in sample.images for row, _ in image.rows if row.status == "ok" and row.filter}
    return AnnotatedRound(
        round=source.number,
        score=score,
        threshold=threshold,
        select_command=source.select_command,
        out_prefix=source.out_prefix,
        totals={name: count for name, count in totals.items() if count},
        histograms=sample.counts.histograms(),
        lengths={name: counts.tolist() for name, counts in sample.counts.lengths.items()},
        diversity=_diversity(sample.images),
        texts=columns,
        full_lengths=full_lengths,
        decided=source.dataset is not None,
        policy="" if source.dataset is None else _in_words(source.rule),
        counts=sample.counts.result(recorded),
        human_auc=source.human_auc,
        movable=source.movable,
        filter=filters.pop() if len(filters) == 1 else "",
    )


def _in_words(rule: Rule) -> str:
    """What a text must reach, and which of those that do are kept."""
    words = str(rule)
    if rule.top_k and rule.threshold is not None:
        words += f", the {rule.top_k} best by {rule.rank}"
    return words if rule.keep == "all" else f"{words}, {rule.keep} of an image"


def label_code(label: Label | None) -> int:
    """A label as the page has it: -1 none, 1 right, 0 wrong, and 2 more where it was not given at random."""
    if label is None or label.verdict == "none":
        return -1
    return int(label.verdict == "right") + (0 if label.at_random else 2)


def _nine_digits(score: float | None) -> float | None:
    """A score in nine digits, which determine a 32-bit number."""
    return None if score is None else float(f"{score:.9g}")


def _diversity(images: Sequence[SampledImage]) -> dict[str, dict[str, float]]:
    by_source = {}
    for source in SOURCES:
        texts = [row.text for image in images for row, _ in image.rows if row.source == source and row.status == "ok"]
        if texts := texts[:MAX_DIVERSITY]:
            by_source[source] = {**diversity(texts), "texts": float(len(texts))}
    return by_source
