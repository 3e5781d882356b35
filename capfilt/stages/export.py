"""export: data as other tools read them, part by part; a part is one shard, or several where files are to be larger.

Every sample ends as kept, dropped (it has no text, and the format is one of texts) or failed, and what is counted must
be what the run that the data come from has in its own ledger.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import ClassVar, Literal, NamedTuple

import pyarrow.compute as pc
from pydantic import Field

import capfilt.data.annotations as tables
from capfilt.config import Config
from capfilt.data import shards
from capfilt.data.exports.form import Finished, Part, words
from capfilt.data.exports.forms import FORMS
from capfilt.data.policy import failure_class
from capfilt.data.sample import FailedSample, Sample
from capfilt.errors import DataError, RunError
from capfilt.runs.ledger import Ledger, fingerprint
from capfilt.runs.tally import NO_TEXT, Tally
from capfilt.stages.inputs import ShardsJob
from capfilt.stages.select import annotations_sha256, caption_of, read_verdicts
from capfilt.storage.paths import StoragePath

STAGE = "export"
FULL = 0.9
"""The share of `samples_per_shard` that files have at least, but for the last ones: so many shards make a part."""


class ExportConfig(Config):
    """How data are written; all of it decides what is written."""

    form: str
    samples_per_shard: int = Field(default=0, ge=0)
    """Samples of a file at most; 0 = a file for each shard."""
    image_root: str | None = None
    """What stands before the paths of pictures in a list; None = the folder of the export."""


class Piece(NamedTuple):
    """A part of an export; as JSON it is an item of the stage."""

    first: int
    """The number of its first file."""
    files: int
    samples: int
    """Samples that its shards have; 0 where they were not counted, since a file is to hold them all."""
    urls: Sequence[str]

    @property
    def name(self) -> str:
        """Its name in the ledger."""
        return f"{self.first:08d}"

    @property
    def per_file(self) -> int:
        """Samples of a file at most, so that its files are equal; 0 for all."""
        return math.ceil(self.samples / self.files)


def pieces(urls: Sequence[str], counts: Mapping[str, int], wanted: int) -> list[Piece]:
    """The parts of an export: a shard each, or with `wanted` samples in a file as many shards as fill theirs to FULL.

    `counts`: the samples of each shard, which `wanted` needs.
    """
    if not wanted:
        return [Piece(number, 1, 0, (url,)) for number, url in enumerate(urls)]
    made: list[Piece] = []
    group: list[str] = []
    first = size = 0
    for url in urls:
        group.append(url)
        size += counts[url]
        files = max(1, math.ceil(size / wanted))
        if size >= FULL * files * wanted or url == urls[-1]:
            made.append(Piece(first, files, max(1, size), group))
            first, size, group = first + files, 0, []
    return made


class ExportJob(ShardsJob):
    """Writes the files of a part; an item says which shards it is made of and which files of the export it has."""

    name: ClassVar[str] = STAGE
    unit: ClassVar[str] = "shards"

    config: ExportConfig
    total: int
    """Files of the whole export."""
    annotations: StoragePath | None = None
    """The folder of tables whose texts take the place of those in the shards."""
    verdicts: StoragePath | None = None
    """The folder of a selection's tables, from which uids are read."""

    def identity(self, item: str) -> str:
        """The fingerprint of the format, of the part's place, and of the shards and tables that it reads."""
        piece = Piece(*json.loads(item))
        contents = [json.dumps(shards.identity(url), sort_keys=True) for url in piece.urls]
        if self.annotations is not None:
            contents += [annotations_sha256(self.annotations, self.shard_name(url)) for url in piece.urls]
        settings = self.config.model_dump(mode="json")
        return fingerprint(settings, self.total, piece.first, piece.files, piece.samples, *contents)

    def open(self) -> Callable[[str], None]:
        return self.part

    def part(self, item: str) -> None:
        """Write the files of one part, and commit it."""
        piece, form, tally = Piece(*json.loads(item)), FORMS[self.config.form], Tally.zero()
        root = self.config.image_root or ""
        place = Part(self.out, piece.first, piece.files, piece.per_file, self.total, root, tally.remarks)
        samples = self._kept(piece, tally)
        outputs = form.write(place, samples)
        if next(samples, None) is not None:
            raise RunError(f"part {piece.name} has more than the {piece.samples} samples that were counted: its shards"
                           " changed meanwhile. Export into another --out.")  # fmt: skip
        Ledger(self.out, STAGE).commit(piece.name, self.identity(item), outputs, tally)

    def _kept(self, piece: Piece, tally: Tally) -> Iterator[Sample]:
        """The samples of a part that are written, with nothing but readable texts; counts all of them."""
        form = FORMS[self.config.form]
        for item in (item for url in piece.urls for item in self._items(url)):
            if isinstance(item, FailedSample):
                tally.add_failed(failure_class(item.reason))
                continue
            if form.reads != "uids":
                _count_texts(item, tally)
            if form.needs_text and not item.captions:
                tally.samples.update(["in", "dropped"])
                continue
            tally.samples.update(["in", "kept"])
            meta = {**item.meta, "uid": item.uid, "sha256": item.sha256, "captions": item.captions}
            yield item if form.reads == "uids" else replace(item, text=words(item.text) or "", meta=meta)

    def _items(self, url: str) -> Iterator[Sample | FailedSample]:
        """The samples of a shard, with the texts of its annotations where there are any."""
        form, name = FORMS[self.config.form], self.shard_name(url)
        if form.reads == "uids" and (self.verdicts or self.annotations) is not None:
            yield from _samples_of_tables(name, self.verdicts, self.annotations)
            return
        items = shards.read(url, extras=form.carries)
        yield from items if self.annotations is None else annotated(items, self.annotations, name)


def _count_texts(sample: Sample, tally: Tally) -> None:
    readable = Counter(caption["source"] for caption in sample.captions)
    came = Counter(caption["source"] for caption in sample.all_captions)
    tally.texts["in"].update(came)
    tally.texts["kept"].update(readable)
    tally.texts["dropped"].update({f"{source}: {NO_TEXT}": count for source, count in (came - readable).items()})


def annotated(
    items: Iterable[Sample | FailedSample], folder: StoragePath, name: str
) -> Iterator[Sample | FailedSample]:
    """The samples of a shard with all texts of its annotations, and their scores. DataError for one without any."""
    texts: dict[str, list[tables.Annotation]] = {}
    failed: dict[str, str] = {}
    for row in tables.rows(tables.read(folder / f"{name}.parquet")):
        if row.status == "failed":
            failed[row.key] = row.reason
        else:
            texts.setdefault(row.key, []).append(row)
    for item in items:
        if isinstance(item, FailedSample):
            yield item
        elif item.key in texts:
            yield replace(item, meta={**item.meta, "captions": [caption_of(row) for row in texts[item.key]]})
        elif item.key in failed:
            yield FailedSample(item.key, failed[item.key])
        else:
            raise DataError(f"shard {name}: key {item.key} has no annotation; annotate this shard again.")


def _samples_of_tables(
    name: str, verdicts: StoragePath | None, annotations: StoragePath | None
) -> Iterator[Sample | FailedSample]:
    """The samples of a shard without their pictures: those that a selection kept, or all that were annotated."""
    if verdicts is not None:
        table = read_verdicts(verdicts / f"{name}.parquet")
        table = table.filter(pc.equal(table["verdict"], "kept"))
    else:
        assert annotations is not None
        table = tables.read(annotations / f"{name}.parquet")
    for (key, status), rows in groupby(tables.rows(table), key=lambda row: (row.key, row.status)):
        for number, row in enumerate(rows):
            if status == "failed":  # a key that comes again has a row each time
                yield FailedSample(key, row.reason)
            elif number == 0:
                yield Sample(key, b"", "", "", {"uid": row.uid})


def finished(out: StoragePath, planned: Sequence[Piece]) -> Iterator[Finished]:
    """What each part came to, in order, as the ledger has it."""
    ledger = Ledger(out, STAGE)
    per_file = {piece.name: piece.per_file for piece in planned}
    for done in ledger.completions():
        files = [out / output.path for output in done.outputs]
        yield Finished(files, done.tally.samples["kept"], per_file[done.shard])


def check_counts(tally: Tally, expected: Tally, source: StoragePath, column: Literal["in", "kept"]) -> None:
    """Raise RunError unless what came in is what the run that the data come from has counted (`column`)."""
    counted = {"samples": (tally.samples["in"], expected.samples[column])}
    counted |= {f"{of} texts": (came, expected.texts[column][of]) for of, came in tally.texts["in"].items()}
    for what, (came, known) in counted.items():
        if came != known:
            raise RunError(
                f"{came} {what} came in, and {known} are in the ledger of {source}: its shards are not those that it"
                f" wrote or read. `capfilt verify {source}` says more."
            )
