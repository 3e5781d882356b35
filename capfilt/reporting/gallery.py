"""The gallery of the page: sampled images of every round, their texts with scores, truth and labels, and thumbnails."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    ImageId,
    RoundSample,
    RoundSource,
    SampledImage,
    random_rank,
    sampled_shards,
)
from capfilt.reporting.thumbnails import byte_budget, images_to_show, thumbnails
from capfilt.runs.tally import MAX_REASONS, OTHER

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
    names = sorted({path.stem for source in sources for path in source.annotations.glob("*.parquet")})
    sampled = sampled_shards(names)
    rounds = [RoundSample(source, MAX_TEXTS // len(sources), MAX_PAGE_BYTES // len(sources)) for source in sources]
    truths_by_uid: dict[str, Truth] = {}
    for name in names:
        shard_truths = truths(urls[name]) if name in urls else {}
        for sample in rounds:
            if (sample.source.annotations / f"{name}.parquet").is_file():
                sample.add(name, shard_truths, name in sampled)
        if name in sampled:
            truths_by_uid |= shard_truths
    images = {image.id: image for sample in rounds for image in sample.images}
    in_order = sorted(images.values(), key=lambda image: (random_rank(image), image.id))
    positions = {image.id: position for position, image in enumerate(in_order)}
    small = thumbnails(urls, images_to_show(rounds), byte_budget(rounds))
    return Gallery(
        rounds=[annotated_round(sample, positions, truths_by_uid, labels, lists) for sample in rounds],
        images=[(key, small.get((shard, key))) for shard, key in positions],
        identities=[(shard, images[shard, key].uid) for shard, key in positions],
        lists=lists,
        texts=[_text_keys(sample) for sample in rounds],
        notes=list(_notes(rounds, (len(sampled), len(names)), (len(small), len(positions)))),
    )


def _text_keys(sample: RoundSample) -> list[TextKey]:
    return [
        ("" if (row.source, row.candidate) in image.full_lengths else row.uid, row.source, row.text)
        for image in sample.images
        for row, _ in image.rows
    ]


def _notes(rounds: Sequence[RoundSample], num_shards: tuple[int, int], num_images: tuple[int, int]) -> Iterator[str]:
    """What of the run is in the page; `num_shards` is (sampled, all), `num_images` (with a thumbnail, all)."""
    total = sum(sum(sample.counts.totals.values()) for sample in rounds)
    shown = sum(sample.num_rows for sample in rounds)
    if shown < total:
        of = f" of {num_shards[0]} of the {num_shards[1]} shards" if num_shards[0] < num_shards[1] else ""
        yield (
            f"Tables and histograms count all {total:,} texts. The gallery and the live figures hold {shown:,} of them:"
            f" those of {num_images[1]:,} images drawn at random{of}."
        )
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
) -> AnnotatedRound:
    """A round as the page has it.

    `positions` gives the position of each image in the page, `truths` what is known of web texts by uid, `labels` the
    labels by (uid, text).
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
    filters = {row.filter for image in sample.images for row, _ in image.rows if row.status == "ok" and row.filter}
    return AnnotatedRound(
        round=source.number,
        score=score,
        threshold=threshold,
        select_command=source.select_command,
        out_prefix=source.out_prefix,
        totals={name: count for name, count in sample.counts.totals.items() if count},
        histograms=sample.counts.histograms(),
        lengths={name: counts.tolist() for name, counts in sample.counts.lengths.items()},
        diversity=_diversity(sample.images),
        texts=columns,
        full_lengths=full_lengths,
        decided=source.dataset is not None,
        policy="" if source.dataset is None else _in_words(source.rule),
        counts=sample.counts.result(),
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
