"""held-out: what decontamination needs to know of held-out pictures, and copies of some of them for its self-test.

One shard of held-out pictures in, one table of `references` out. The mirror images and the copies are encoded, and go
the way of every sample of a pool, through the same code and the same model. Which pictures are copied depends on the
seed and on their uids alone.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps

from capfilt.data import shards
from capfilt.data.images.copies import COPIES, copy_of
from capfilt.data.images.decode import decode
from capfilt.data.policy import failure_class
from capfilt.data.sample import FailedSample, Sample
from capfilt.data.text.equality import normalised
from capfilt.errors import ImageError
from capfilt.runs.ledger import Ledger, fingerprint
from capfilt.runs.tally import Tally
from capfilt.stages.inputs import ShardsJob
from capfilt.stages.near.decontaminate.references import FOLDER, ITSELF, MIRRORED, NAMES, schema
from capfilt.stages.near.embed import EmbedJob, ShardEmbedder
from capfilt.stages.outputs import write_table


class HeldOutJob(ShardsJob):
    """The job that describes held-out pictures."""

    name: ClassVar[str] = "held-out"
    by_content: ClassVar[bool] = True
    only_reads: ClassVar[bool] = True

    embed: EmbedJob | None = None
    """How pictures are hashed and, with a model, embedded; None: only their bytes are, and nothing is copied."""
    copied: int = 0
    """Pictures of each shard of which copies are made."""
    seed: int = 0

    def identity(self, item: str) -> str:
        """What is computed, and the shard's name."""
        embedded = None if self.embed is None else self.embed.identity(item)
        return fingerprint(embedded, self.copied, self.seed, shards.name(item))

    def open(self) -> Callable[[str], None]:
        """Load the model, where there is one."""
        embedder = None if self.embed is None else ShardEmbedder(self.embed, self.embed.compute.open())
        return lambda url: self._shard(url, embedder)

    def _shard(self, url: str, embedder: ShardEmbedder | None) -> None:
        name = self.shard_name(url)
        tally, digest = Tally.zero(), shards.Digest(shards.stat(url)["version"])
        read = shards.read(url, digest)
        rows, vectors = self._by_bytes(read, tally) if embedder is None else self._by_pixels(read, tally, embedder)
        described = None if embedder is None else embedder.vectors
        table = pa.Table.from_pylist(rows, schema(None))
        if described is not None:
            values = np.asarray(vectors, np.float16).reshape(len(rows) * described.dim)
            made = pa.FixedSizeListArray.from_arrays(pa.array(values), described.dim)
            table = table.append_column(schema(described).field("vector"), made)
        path = self.out / FOLDER / f"{name}.parquet"
        write_table(path, table)
        Ledger(self.out, self.name).commit(name, self.identity(url), [path], tally, digest.result())

    def _by_bytes(
        self, read: Iterable[Sample | FailedSample], tally: Tally
    ) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
        rows = []
        for item in read:
            if isinstance(item, Sample):
                tally.samples.update(["in", "kept"])
                rows.append(_row(item, None))
            else:
                tally.add_failed(failure_class(item.reason))
        return rows, []

    def _by_pixels(
        self, read: Iterable[Sample | FailedSample], tally: Tally, embedder: ShardEmbedder
    ) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
        rows: list[dict[str, Any]] = []
        vectors: list[np.ndarray] = []
        for batch in embedder.batches(self._with_copies(read)):
            for fault in batch.faults:
                tally.add_failed(failure_class(fault.reason))
            for sample, embedding in zip(batch.samples, batch.embeddings, strict=True):
                if not isinstance(sample, _Copy):
                    tally.samples.update(["in", "kept"])
                rows.append(_row(sample, embedding.phash))
            vectors += embedder.vectors_of(batch)
        return rows, vectors

    def _with_copies(self, read: Iterable[Sample | FailedSample]) -> Iterator[Sample | FailedSample]:
        """A picture itself and its mirror image, in the order of the shard; then the copies of some."""
        drawn: list[tuple[str, Sample]] = []
        for item in read:
            try:
                if not isinstance(item, Sample):
                    raise ImageError(item.reason)
                image = decode(item.image)
            except ImageError as error:
                yield FailedSample(item.key, str(error))
                continue
            yield item
            yield _Copy.of(item, MIRRORED, _lossless(ImageOps.mirror(image)))
            draw = hashlib.sha256(f"{self.seed} {item.uid} {item.key}".encode()).hexdigest()
            drawn = sorted([*drawn, (draw, item)], key=itemgetter(0))[: self.copied]
        for _, sample in drawn:
            image = decode(sample.image)
            yield from (_Copy.of(sample, kind, copy_of(image, kind)) for kind in COPIES)


@dataclass(frozen=True)
class _Copy(Sample):
    """A picture that was made of another one."""

    original: Mapping[str, str] = field(default_factory=dict)
    """The names of that one."""
    kind: str = ""

    @classmethod
    def of(cls, original: Sample, kind: str, image: bytes) -> _Copy:
        return cls(original.key, image, original.extension, "", original=_names(original), kind=kind)


def _names(sample: Sample) -> dict[str, str]:
    return dict(zip(NAMES, (sample.key, sample.uid, sample.sha256), strict=True))


def _row(sample: Sample, phash: int | None) -> dict[str, Any]:
    if isinstance(sample, _Copy):
        return {**sample.original, "copy": sample.kind, "phash": phash, "texts": []}
    texts = dict.fromkeys(normalised(caption["text"]) for caption in sample.captions)
    return {**_names(sample), "copy": ITSELF, "phash": phash, "texts": [text for text in texts if text]}


def _lossless(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "BMP")
    return file.getvalue()
