"""embed: hashes, size and, with a model, a vector of every picture of the shards.

One shard in, one Parquet out (`data.embeddings`), a row for every picture that can be read. What cannot is in the
ledger, by reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from capfilt.cluster.session import Session
from capfilt.cluster.worker_pool import Resources
from capfilt.config import Config
from capfilt.data import embeddings, shards
from capfilt.data.embeddings import Embedding, Kind, Vectors
from capfilt.data.images.preprocess import ImageFormat, Preprocess
from capfilt.data.policy import failure_class
from capfilt.data.sample import FailedSample, Sample
from capfilt.errors import NoModelError, RecipeError, UsageError
from capfilt.inference.config import Precision
from capfilt.inference.device import Compute
from capfilt.models.checkpoints import store
from capfilt.runs import deadline
from capfilt.runs.ledger import Ledger, fingerprint
from capfilt.runs.metrics import ShardReport
from capfilt.runs.progress import Progress
from capfilt.runs.tally import Tally
from capfilt.stages.bisect import Splittable
from capfilt.stages.inputs import ShardsJob
from capfilt.stages.runner import run_stage
from capfilt.stages.shard_reading import ReadAhead, ShardReading
from capfilt.storage.atomic import sha256_file
from capfilt.storage.paths import StoragePath, storage_path

if TYPE_CHECKING:
    import torch

    from capfilt.inference.batches import Pictures
    from capfilt.inference.embedder import Embedder

STAGE = "embed"
COPY = "copy="
"""What a TorchScript file is named with, since loading it runs code that lies in it."""
NEEDS = frozenset({"encode_image", "encode_text"})
"""What a model must be able to do to have a vector of a picture alone."""


class EmbedConfig(Config):
    """How pictures are embedded."""

    batch_size: int = Field(default=64, ge=1)
    """Images at a time."""
    precision: Precision = "auto"
    """auto: bf16 where all workers have GPUs that multiply it in hardware, fp32 on CPUs."""
    size: int = Field(default=320, ge=1, le=4096)
    """Side of the pictures that a copy-detection descriptor reads, pixels. SSCD: 320 squashed, or 288; ISC's winner:
    512. Other models say themselves what they read."""
    preprocess: Preprocess = Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), resample="bilinear")
    """How these are prepared: squashed, ImageNet's mean and standard deviation, as SSCD and ISC's winner were
    trained."""


EXECUTION_FIELDS = {"batch_size": True, "precision": True}
"""What EmbedConfig says of how vectors are computed and not of which."""


class VectorModel(Config):
    """What makes the vectors."""

    kind: Kind
    path: StoragePath
    fingerprint: str

    @classmethod
    def find(cls, name: str, show: Progress) -> VectorModel:
        """A model by name, folder or file as everywhere, or a copy-detection descriptor as `copy=FILE`.

        Raises:
            NoModelError: none is there.
            RecipeError: it has no vector of a picture alone.
        """
        if name.startswith(COPY):
            path = storage_path(name.removeprefix(COPY)).absolute()
            if not path.is_file():
                raise NoModelError(f"{name}: there is no file {path}; give a TorchScript descriptor, such as SSCD's.")
            return cls(kind="copy", path=path, fingerprint=sha256_file(path))
        if name.endswith(".torchscript.pt"):
            raise UsageError(
                f"{name} brings code along, which is run when it is loaded: if you trust whoever made it, say"
                f" --model {COPY}{name}."
            )
        model = store.find(name)
        able = store.architecture(model).capabilities
        if missing := NEEDS - able:
            raise RecipeError(
                f"{name} makes no vector of a picture alone: it cannot {', '.join(sorted(missing))}. Take CLIP, BLIP,"
                " BLIP-2, ALBEF, X-VLM or VLMo."
            )
        with show.wait("reading the weights of the model"):
            return cls(kind=embeddings.kind_of(able), path=model, fingerprint=store.fingerprint(model))

    def open(self, config: EmbedConfig, compute: Compute) -> Embedder:
        from capfilt.inference.embedder import CopyEmbedder, ModelEmbedder

        if self.kind == "copy":
            return CopyEmbedder(self.path, ImageFormat(config.size, config.preprocess), compute.open())
        return ModelEmbedder(self.path, compute)


class EmbedJob(ShardsJob):
    """What an embedding worker needs to know."""

    name: ClassVar[str] = STAGE
    splittable: ClassVar[bool] = True
    by_content: ClassVar[bool] = True
    loads: ClassVar[str] = "the model to load"

    model: VectorModel | None
    """None: hashes alone."""
    config: EmbedConfig
    compute: Compute

    def identity(self, item: str) -> str:
        """The model by its weights and, where its pictures are prepared as the config says, by that."""
        if self.model is None:
            return fingerprint(STAGE, shards.name(item))
        prepared = self.config.model_dump(mode="json", exclude=EXECUTION_FIELDS) if self.model.kind == "copy" else None
        made_by = [self.model.kind, self.model.fingerprint, self.compute.model_dump(mode="json"), prepared]
        return fingerprint(STAGE, shards.name(item), *made_by)

    def open(self) -> Splittable:
        embedder = ShardEmbedder(self, self.compute.open())
        return Splittable(embedder.shard, embedder.part, embedder.reading.expect, embedder.reading.close)


class ShardEmbedder:
    """What a worker does to a shard: pictures decoded, hashed and embedded, a commit."""

    def __init__(self, job: EmbedJob, device: torch.device):
        from capfilt.inference.embedder import dimension
        from capfilt.inference.oom_backoff import OomBackoff

        self.job, self.device, self.oom_backoff = job, device, OomBackoff()
        self.embedder = None if job.model is None else job.model.open(job.config, job.compute)
        self.reading = ReadAhead(job, lambda _, read: self.batches(read))
        self.vectors = None
        if job.model is not None and self.embedder is not None:
            dim = dimension(self.embedder.vectors, self.embedder.image_format, device)
            self.vectors = Vectors(job.model.kind, job.model.fingerprint, dim)

    def shard(self, url: str) -> ShardReport:
        with self.reading.shard(url) as reading:
            return self._shard(reading)

    def _shard(self, reading: ShardReading) -> ShardReport:
        name = self.job.shard_name(reading.url)
        rows: list[Embedding] = []
        values: list[np.ndarray] = []
        tally = Tally.zero()
        for batch in reading.batches:
            deadline.check()
            tally.samples.update({"in": len(batch.samples), "kept": len(batch.samples)})
            for fault in batch.faults:
                tally.add_failed(failure_class(fault.reason))
            rows += batch.embeddings
            values += self.vectors_of(batch)
        tally.members.update(reading.members)
        path = embeddings.path_of(self.job.out, name)
        embeddings.write(path, rows, self.vectors, values)
        Ledger(self.job.out, self.job.name).commit(name, reading.identity, [path], tally, reading.digest.result())
        return ShardReport(self.oom_backoff.said)

    def part(self, url: str, start: int, stop: int) -> int:
        """Embed some samples of a shard for the sake of finding out whether one kills; returns how many it has."""
        for batch in self.batches(islice(shards.read(url), start, stop)):
            self.vectors_of(batch)
        return sum(1 for _ in shards.read(url))

    def batches(self, read: Iterable[Sample | FailedSample]) -> Iterator[Pictures]:
        """Decode and hash what is read; every key of it is in exactly one batch, as a sample or as a fault."""
        from capfilt.inference.batches import batches_of

        formats = () if self.embedder is None else (self.embedder.image_format,)
        return batches_of(read, self.job.config.batch_size, formats, self.device, with_hashes=True)

    def vectors_of(self, batch: Pictures) -> list[np.ndarray]:
        """The vectors of a batch, float16 [D] each; none without a model."""
        embedder = self.embedder
        if embedder is None or not batch.samples:
            return []
        from capfilt.inference.batches import NotYetCopied

        images = NotYetCopied(batch, self.device, (embedder.image_format,))
        return self.oom_backoff.run(
            lambda start, stop: [*embedder.vectors(images.part(slice(start, stop))).astype(np.float16)],
            len(batch.samples),
        )


def embed(
    session: Session,
    urls: Sequence[str],
    job: EmbedJob,
    resources: Resources,
    show: Progress,
    label: str = STAGE,
) -> Tally:
    """Embed shards; returns what became of their samples."""
    named = shards.by_name(urls)
    return run_stage(session, job.model_copy(update={"names": shards.renamed(named)}), named, resources, show, label)
