"""Collects what the page of two runs shows; runs no model, and counts all annotations of both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import capfilt.data.annotations as tables
from capfilt.errors import RunError, UsageError
from capfilt.evaluation.known_truth import Truth, truths
from capfilt.printable import MAX_NAME, short_repr
from capfilt.reporting.collect import RunRecord, read_run
from capfilt.reporting.comparison.join import Joined, join
from capfilt.reporting.gallery import ColumnLists, annotated_round
from capfilt.reporting.page_data import AnnotatedRound
from capfilt.reporting.sampling import MAX_PAGE_BYTES, MAX_SHARDS, MAX_TEXTS, RoundSample
from capfilt.reporting.thumbnails import MAX_THUMBNAIL_BYTES, MAX_THUMBNAILS, thumbnails
from capfilt.storage import documents
from capfilt.storage.paths import StoragePath
from capfilt.yaml_loader import load_yaml


@dataclass(frozen=True)
class Side:
    """One of the two runs: its newest annotated round."""

    record: RunRecord
    sample: RoundSample
    annotated: AnnotatedRound
    settings: Mapping[str, str]
    """The settings of its recipe and its models, by dotted key."""
    truths: Mapping[str, Truth]
    """What is known of the web texts of its sampled images, by uid."""

    @property
    def name(self) -> str:
        """The run folder's name; with the round where it has several."""
        name = self.record.folder.absolute().name
        return f"{name}, round {self.annotated.round}" if self.annotated.round else name

    @property
    def figures(self) -> Mapping[str, Any]:
        """The entry of its round in summary.json; {} where there is none."""
        return next((entry for entry in self.record.rounds if entry["round"] == self.annotated.round), {})


@dataclass(frozen=True)
class Comparison:
    """Two runs, what they share, and thumbnails of some of the images."""

    sides: tuple[Side, Side]
    joined: Joined
    thumbnails: Mapping[str, str]
    """By uid."""
    notes: list[str]


def collect_comparison(folders: tuple[StoragePath, StoragePath], fetch: bool = False) -> Comparison:
    """Read two runs and join them.

    `fetch` allows to read shards that the runs' plans name on other machines. UsageError for one run given twice;
    RunError for a run without annotations.
    """
    if folders[0].absolute() == folders[1].absolute():
        raise UsageError(f"{folders[0]} is compared with itself; give two run folders.")
    notes: list[str] = []
    first, second = (_read_side(folder, fetch, notes) for folder in folders)
    joined = join(first.sample, second.sample)
    notes += _notes((first, second), joined)
    return Comparison((first, second), joined, _thumbnails((first, second), joined), notes)


def _read_side(folder: StoragePath, fetch: bool, notes: list[str]) -> Side:
    record = read_run(folder, fetch, None, notes)
    if not record.sources:
        raise RunError(
            f"{folder} is a run of {record.command} without annotations, so there is nothing to join; give two runs"
            " of annotate, select or bootstrap."
        )
    source = record.sources[-1]
    sample = RoundSample(source, MAX_TEXTS // 2, MAX_PAGE_BYTES // 3, movable_threshold=source.dataset is None)
    known: dict[str, Truth] = {}
    for name in tables.shards_in(source.annotations):
        of_shard = truths(record.urls[name]) if name in record.urls else {}
        sample.add(name, of_shard, sample=True)
        known |= of_shard
        if len(known) > 2 * MAX_TEXTS:  # memory does not grow with the run
            present = {image.uid for image in sample.images}
            known = {uid: truth for uid, truth in known.items() if uid in present}
    positions = {image.id: position for position, image in enumerate(sample.images)}
    annotated = annotated_round(sample, positions, {}, {}, ColumnLists())
    return Side(record, sample, annotated, dict(_settings(record)), known)


def _settings(record: RunRecord) -> Iterator[tuple[str, str]]:
    path = record.folder / "recipe.yaml"
    tree = load_yaml(documents.check_record(path)) if path.is_file() else {}
    yield from _flat("", tree if isinstance(tree, Mapping) else {})
    for name in ("captioner_fingerprint", "filter_fingerprint", "seed", "annotations", "shards"):
        if name in record.plan and not isinstance(record.plan[name], Mapping):
            value = record.plan[name]
            yield name, f"{len(value)} shards" if isinstance(value, list) and len(value) > 1 else str(value)


def _flat(prefix: str, tree: Mapping[Any, Any], depth: int = 8) -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and depth:
            yield from _flat(f"{prefix}{name}.", value, depth - 1)
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else short_repr(value, MAX_NAME)


def _notes(sides: Sequence[Side], joined: Joined) -> Iterator[str]:
    for side in sides:
        if not side.annotated.decided:
            yield (
                f"No policy has run on {side.name}: where its texts pass or stay below, it is by a threshold to try,"
                f" {side.annotated.score} ≥ {side.annotated.threshold:.3f}."
            )
    if not joined.whole:
        first, second = joined.candidates
        yield (
            f"The tables of totals count all texts. What is joined is drawn at random, by the hash of the images' uids:"
            f" {first:,} images of the first run and {second:,} of the second were looked up in each other,"
            f" {len(joined.images):,} are in both."
        )


def _thumbnails(sides: tuple[Side, Side], joined: Joined) -> dict[str, str]:
    """Pictures of the joined images, from the first run's shards that have the most of them, each of which is read once
    more; from the second's where the first's are gone."""
    urls = sides[0].record.urls or sides[1].record.urls
    uids = {(image.first if sides[0].record.urls else image.second).id: image.first.uid for image in joined.images}
    counts = Counter(shard for shard, _ in uids)
    chosen = {shard for shard, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MAX_SHARDS]}
    wanted = [image for image in uids if image[0] in chosen][:MAX_THUMBNAILS]
    texts = sum(image.first.num_bytes + image.second.num_bytes for image in joined.images)
    room = max(0, min(MAX_THUMBNAIL_BYTES, (MAX_PAGE_BYTES - texts) * 3 // 4))
    return {uids[image]: picture for image, picture in thumbnails(urls, set(wanted), room).items()}
