"""What a worker does to a shard whose annotations get further scores: one reading, then a table and a commit each."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

import capfilt.data.annotations as tables
from capfilt.data import scores, shards
from capfilt.data.annotations import Annotation
from capfilt.data.duplicates import is_copy, reason_class
from capfilt.data.images.preprocess import ImageFormat
from capfilt.data.sample import FailedSample, Sample
from capfilt.errors import DataError
from capfilt.inference.batches import NotYetCopied, Pictures, pictures
from capfilt.inference.local_model import LocalModel
from capfilt.inference.oom_backoff import OomBackoff
from capfilt.inference.scores.interface import ScoredImages, Scorer, Values
from capfilt.inference.scores.rules import MEASURES
from capfilt.runs import deadline
from capfilt.runs.ledger import Input, Ledger
from capfilt.runs.tally import Tally
from capfilt.stages.inputs import same_bytes
from capfilt.storage.atomic import sha256_file

if TYPE_CHECKING:
    from capfilt.stages.annotation.add_score import AddScoreJob


class ShardScorer:
    """The scorers of one job and of those beside it, on a device."""

    def __init__(self, job: AddScoreJob, device: torch.device):
        self.job, self.device = job, device
        self.oom_backoff = OomBackoff()
        load = functools.cache(lambda folder: LocalModel.load(folder, device, job.compute.dtype))
        self.jobs = (job, *job.beside)
        self.scorers = {each.spec.name: each.spec.open(load, device) for each in self.jobs}

    def shard(self, url: str) -> None:
        """Compute the scores that a shard lacks, and commit each."""
        name = self.job.shard_name(url)
        todo = [job for job in self.jobs if Ledger(job.out, job.name).completion(name, job.identity(url)) is None]
        path = self.job.out / "annotations" / f"{name}.parquet"
        annotated = Ledger(self.job.out, "annotate").read(self.job.out / "ledger/annotate" / f"{name}.json")
        digest = sha256_file(path)
        if annotated is None or digest not in {output.sha256 for output in annotated.outputs}:
            raise DataError(f"{path} is not what was committed: `capfilt verify --mend` says more; annotate it again.")
        rows = list(tables.rows(tables.read(path)))
        images = _images(rows)
        read = None
        if self.job.by_content:
            found, read = self._of_pictures(url, [job.spec.name for job in todo], rows, images)
            if read is None or not same_bytes(annotated.input, read):
                raise DataError(f"shard {name} has changed since it was annotated: annotate it again first.")
        else:
            [scorer] = self.scorers.values()
            values = scorer.score(ScoredImages([[rows[i] for i in image] for image in images.values()]))
            found = {self.job.spec.name: _aligned(images.values(), values, len(rows))}
        for job in todo:
            out = scores.path_of(job.out, job.spec.name, name)
            scores.write(out, job.spec.name, found[job.spec.name], digest)
            tally = _tally(annotated.tally, rows, found[job.spec.name], job.spec.name)
            Ledger(job.out, job.name).commit(name, job.identity(url), [out], tally, read)

    def _of_pictures(
        self, url: str, wanted: Sequence[str], rows: Sequence[Annotation], images: dict[str, list[int]]
    ) -> tuple[dict[str, list[float | None]], Input | None]:
        """By score, its value of each row, and the shard that was read."""
        scorers = {name: self.scorers[name] for name in wanted}
        formats = [image_format for scorer in scorers.values() for image_format in scorer.image_formats]
        measures = {name: MEASURES[name] for name in wanted if name in MEASURES}
        values: dict[str, list[float | None]] = {name: [None] * len(rows) for name in wanted}
        waiting, digest = dict(images), shards.Digest(shards.stat(url)["version"])
        read = _annotated(shards.read(url, digest), waiting)
        for batch in pictures(read, self.job.batch_size, formats, device=self.device, measures=measures):
            deadline.check()
            if batch.faults:
                fault = batch.faults[0]
                raise DataError(f"{url}: key {fault.key} was annotated and cannot be read now: {fault.reason}.")
            of_images = [images[sample.key] for sample in batch.samples]
            of_batch = [[rows[i] for i in image] for image in of_images]
            for image, found in zip(of_images, self._score(scorers, of_batch, batch, formats), strict=True):
                for name, of_image in found.items():
                    for i, value in zip(image, of_image, strict=True):
                        values[name][i] = value
        if waiting:
            raise DataError(f"{url}: key {next(iter(waiting))} was annotated and is not there now; annotate it again.")
        return values, digest.result()

    def _score(
        self,
        scorers: Mapping[str, Scorer],
        rows: Sequence[Sequence[Annotation]],
        batch: Pictures,
        formats: Sequence[ImageFormat],
    ) -> list[dict[str, Sequence[float | None]]]:
        """Of each picture of a batch its values by score, in halves where the batch does not fit into memory."""
        images = NotYetCopied(batch, self.device, formats)

        def part(start: int, stop: int) -> list[dict[str, Sequence[float | None]]]:
            some = slice(start, stop)
            scored = ScoredImages(rows[some], images.part(some), batch.measured[some])
            found = {name: scorer.score(scored) for name, scorer in scorers.items()}
            return [{name: values[i] for name, values in found.items()} for i in range(stop - start)]

        return self.oom_backoff.run(part, len(rows))


def _images(rows: Sequence[Annotation]) -> dict[str, list[int]]:
    """The numbers of the rows of each image, by its key; failed ones have none, nor have copies, which are dropped and
    would count in the pool of a share."""
    images: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        if row.status == "ok" and not is_copy(row.reason):
            images.setdefault(row.key, []).append(number)
    return images


def _annotated(read: Iterable[Sample | FailedSample], waiting: dict[str, list[int]]) -> Iterator[Sample | FailedSample]:
    """The samples that have annotations, each once; what failed then is passed over, and need not be decoded."""
    for item in read:
        if isinstance(item, Sample) and waiting.pop(item.key, None) is not None:
            yield item


def _aligned(images: Iterable[Sequence[int]], values: Values, num_rows: int) -> list[float | None]:
    """The value of each row of the table; None for those of no image."""
    aligned: list[float | None] = [None] * num_rows
    for image, of_image in zip(images, values, strict=True):
        for i, value in zip(image, of_image, strict=True):
            aligned[i] = value
    return aligned


def _tally(annotated: Tally, rows: Sequence[Annotation], values: Sequence[float | None], name: str) -> Tally:
    """The samples as they were annotated; a text that got no score counts as dropped."""
    tally = Tally.zero()
    tally.samples.update(annotated.samples)
    tally.failed.update(annotated.failed)
    for row, value in zip(rows, values, strict=True):
        if row.status == "ok":
            why = reason_class(row.reason) if is_copy(row.reason) else f"no {name}"
            tally.add_text(row.source, why if value is None else "")
    return tally
