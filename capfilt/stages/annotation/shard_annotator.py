"""What a worker of `annotate` does to a shard: two models on a device, rows of texts with scores, a commit."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from itertools import islice, zip_longest
from typing import TYPE_CHECKING, Any, TypeGuard

import torch

import capfilt.data.annotations as tables
from capfilt.data import embeddings, shards
from capfilt.data.annotations import Annotation
from capfilt.data.duplicates import Copies, reason_class
from capfilt.data.embeddings import Embedding, Vectors
from capfilt.data.policy import failure_class
from capfilt.data.sample import FailedSample, Sample, is_text
from capfilt.inference.annotator import Annotator, Text
from capfilt.inference.batch_growth import BatchSize
from capfilt.inference.batches import NotYetCopied, Pictures, batches_of
from capfilt.inference.captioners.guard_rails import COPIES
from capfilt.inference.embedder import dimension, unit_vectors
from capfilt.inference.filters import local_filter
from capfilt.inference.filters.dual_encoder import DualEncoderFilter
from capfilt.inference.interface import AsksAhead
from capfilt.inference.local_model import LocalModel
from capfilt.inference.timer import StageTimer, timed
from capfilt.runs import deadline
from capfilt.runs.ledger import Ledger
from capfilt.runs.metrics import ShardReport
from capfilt.runs.tally import NO_TEXT, Tally, no_text
from capfilt.stages.shard_reading import ReadAhead, ShardReading

if TYPE_CHECKING:
    from capfilt.stages.annotation.annotate import AnnotateJob


class ShardAnnotator:
    """What a worker does to a shard: two models on a device, rows, a commit."""

    def __init__(self, job: AnnotateJob, device: torch.device, timer: StageTimer | None = None):
        self.job, self.device, self.timer = job, device, timer
        self.batches: list[int] = []  # of the shard at work
        config, dtype = job.config, job.compute.dtype
        captioner = job.captioner.open(config, job.seed, job.round, device, dtype, job.out / "cache")
        filter_ = LocalModel.load(job.filter, device, dtype)
        fixed = config.batch_size if config.deterministic and device.type == "cuda" else 0
        self.annotator = Annotator(captioner, local_filter(filter_, config.max_length), timer, fixed)
        self.asker = captioner if isinstance(captioner, AsksAhead) else None
        self.embedded: list[Embedding] = []  # of the shard at work, where they are kept
        grows = device.type == "cuda" and not fixed and self.asker is None
        self.batch_size = BatchSize(config.batch_size, grows and "batch_size" not in config.model_fields_set)
        self.formats = (*self.annotator.captioner.image_formats, *self.annotator.filter.image_formats)
        self.reading = ReadAhead(job, lambda reading, read: self._batches(reading.url, read, reading.beside))

    def expect(self, url: str | None) -> None:
        """Which shard comes next. Where a captioner is shown pictures they are read in its turn: it keeps the answers
        of each shard apart."""
        self.reading.expect(None if self.asker else url)

    def shard(self, url: str) -> ShardReport:
        with self._asking(url), self.reading.shard(url) as reading:
            return self._shard(reading)

    def _shard(self, reading: ShardReading) -> ShardReport:
        before = Counter(self.timer.seconds) if self.timer else Counter()
        self.batches, self.embedded = [], []
        self.annotator.vectors = [] if self.job.keep_vectors else None
        name = self.job.shard_name(reading.url)
        rows: list[Annotation] = []
        tally = Tally.zero()
        for texts in self._rows(reading.batches):
            rows += texts
            tables.check_size(len(rows), name)  # now, and not when all of it was computed
            if texts[0].status == "failed":
                tally.add_failed(failure_class(texts[0].reason))
                continue
            tally.samples.update(["in", "kept"])
            for row in texts:
                dropped = no_text(row.reason)
                tally.add_text(row.source, dropped)
                said = [] if dropped else row.reason.split("; ")
                tally.remarks.update(one for one in said if one == COPIES or one[:5] == "cut: ")
        rows += reading.beside
        tally += count_copies(reading.beside)
        tally.members.update(reading.members)
        paths = [self.job.out / "annotations" / f"{name}.parquet"]
        with timed(self.timer, "write", on_device=False):
            tables.write(paths[0], rows, self.job.captioner.names_prompts(self.job.config))
            if self.vectors is not None:
                paths.append(embeddings.path_of(self.job.out, name))
                embeddings.write(paths[1], self.embedded, self.vectors, self.annotator.vectors)
            ledger = Ledger(self.job.out, self.job.name)
            ledger.commit(name, reading.identity, paths, tally, reading.digest.result())
        spent = Counter(self.timer.seconds) - before if self.timer else Counter()
        return ShardReport(self.annotator.oom_backoff.said, spent, tuple(self.batches))

    @cached_property
    def vectors(self) -> Vectors | None:
        """What the filter's vectors are, where they are kept."""
        filter_ = self.annotator.filter
        if not self.job.keep_vectors or not isinstance(filter_, DualEncoderFilter):
            return None
        form, kind = filter_.local.image_format, embeddings.kind_of(filter_.model.capabilities)
        dim = dimension(lambda images: unit_vectors(filter_.projection(images)), form, self.device)
        return Vectors(kind, self.job.filter_fingerprint, dim)

    def part(self, url: str, start: int, stop: int) -> int:
        """Annotate some samples of a shard for the sake of finding out whether one kills; returns how many it has."""
        with self._asking(url):
            for _ in self._rows(self._batches(url, islice(shards.read(url), start, stop), [])):
                pass
        return sum(1 for _ in shards.read(url))

    def _asking(self, url: str) -> AbstractContextManager[None]:
        """The time in which a captioner that asks ahead is shown the pictures of a shard."""
        return nullcontext() if self.asker is None else self.asker.shard(self.job.shard_name(url))

    def _batches(self, url: str, read: Iterable[Sample | FailedSample], copies: list[Annotation]) -> Iterator[Pictures]:
        """What is to be annotated of a shard; the texts of copies are added to `copies`, without scores."""

        def skip(sample: Sample, reason: str) -> None:
            texts = [Text("web", 0, text, None, None, whole=True, remark=reason) for text in texts_of(sample)]
            copies.extend(self._texts(sample, texts))

        if self.job.without is not None:
            read = Copies.load(self.job.without, self.job.shard_name(url)).apply(read, skip)
        options: Any = {"timer": self.timer, "asker": self.asker, "with_hashes": self.job.keep_vectors}
        return batches_of(read, lambda: self.batch_size.size, self.formats, self.device, **options)

    def _rows(self, batches: Iterable[Pictures]) -> Iterator[list[Annotation]]:
        """The rows of each key of a shard, or of a part of one."""
        for batch in batches:
            self.embedded += batch.embeddings
            deadline.check()  # a small shard is read to its end before anything is computed
            for fault in batch.faults:
                yield [self._failed(fault)]
            if batch.samples:
                yield from self._annotated(batch)

    def _annotated(self, batch: Pictures) -> Iterator[list[Annotation]]:
        images = NotYetCopied(batch, self.device, self.formats)
        count, began = len(batch.samples), time.perf_counter()
        annotated = self.annotator.annotate(images, batch.samples, [texts_of(sample) for sample in batch.samples])
        limit = self.annotator.oom_backoff.limit
        self.batch_size.note(count, time.perf_counter() - began, limit)
        self.batches.append(min(count, limit or count))
        for sample, texts in zip(batch.samples, annotated, strict=True):
            yield list(self._texts(sample, texts))

    def _texts(self, sample: Sample, texts: Sequence[Text]) -> Iterator[Annotation]:
        """The rows of one image: what came with it, under the source that it came with, then what was written now.

        Candidates count on from those of the same source that came.
        """
        candidates = Counter[str]()
        for text, caption in zip_longest(texts, sample.all_captions):
            source = caption["source"] if caption else text.source
            yield self._row(sample, text, source, candidates[source], caption)
            candidates[source] += 1

    def _row(
        self, sample: Sample, text: Text, source: str, candidate: int, caption: Mapping[str, Any] | None
    ) -> Annotation:
        written = (caption or {}).get("round") if source == "synthetic" else None
        return Annotation(
            key=sample.key,
            uid=sample.uid,
            sha256=sample.sha256,
            source=source,
            candidate=candidate,
            text=text.text,
            itm=text.itm,
            itc=text.itc,
            captioner="" if caption else self.job.captioner_fingerprint,
            filter=self.job.filter_fingerprint,
            seed=self.job.seed,
            round=written if is_round(written) else self.job.round,
            reason=remark(text, self.job.config.max_length),
            prompt=text.prompt or None,
        )

    def _failed(self, fault: FailedSample) -> Annotation:
        return Annotation(
            key=fault.key,
            uid="",
            sha256="",
            source="web",
            candidate=0,
            text="",
            itm=None,
            itc=None,
            captioner="",
            filter="",
            seed=self.job.seed,
            round=self.job.round,
            status="failed",
            reason=fault.reason,
        )


def count_copies(rows: Iterable[Annotation]) -> Tally:
    """The counts of the texts of copies, which go with their pictures."""
    tally = Tally.zero()
    pictures = len({(row.key, row.uid) for row in rows})
    tally.samples.update({"in": pictures, "dropped": pictures})
    for row in rows:
        tally.add_text(row.source, reason_class(row.reason))
    return tally


def remark(text: Text, max_length: int) -> str:
    """What became of a text while it was written, and of its scores: that it has none, or that they are of its
    beginning alone; "" for nothing to say."""
    if not is_text(text.text):
        return no_text(text.remark) or NO_TEXT
    beginning = "" if text.whole else f"scored by its beginning ({max_length} tokens)"
    return "; ".join(said for said in (text.remark, beginning) if said)


def is_round(value: object) -> TypeGuard[int]:
    """Whether a caption's `round` can be one; other people's json may have anything there."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**15


def texts_of(sample: Sample) -> list[str]:
    """The texts that came with an image; half a character, which json can spell and Parquet cannot, becomes "?"."""
    return [caption["text"].encode("utf-8", "replace").decode() for caption in sample.all_captions]
