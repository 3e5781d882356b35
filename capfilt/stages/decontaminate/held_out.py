"""held-out: what decontamination needs to know of the held-out pictures, and copies of some of them for its self-test.

One shard of held-out pictures in, one table of `capfilt.data.held_out` out. Which pictures are copied depends on the
seed and their uids alone.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from capfilt.config import Config
from capfilt.data import shards
from capfilt.data.held_out import ITSELF, MIRRORED, schema
from capfilt.data.images.copies import COPIES, copy_of
from capfilt.data.images.decode import decode
from capfilt.data.images.perceptual_hash import perceptual_hash
from capfilt.data.policy import failure_class
from capfilt.data.sample import Sample
from capfilt.data.text.equality import normalised
from capfilt.errors import ImageError
from capfilt.runs.ledger import Ledger, fingerprint
from capfilt.runs.tally import Tally
from capfilt.stages.embed import Descriptor
from capfilt.storage.atomic import atomic
from capfilt.storage.paths import StoragePath

FOLDER = "held-out"


class HeldOutJob(Config):
    """The job that describes held-out pictures."""

    by_content: ClassVar[bool] = True
    only_reads: ClassVar[bool] = True

    out: StoragePath
    hashes: bool = True
    """Whether pictures are decoded and hashed; else only their bytes are."""
    descriptor: Descriptor | None = None
    """What makes their vectors, where these are compared."""
    copied: int = 0
    """Pictures of each shard of which copies are made."""
    seed: int = 0
    names: dict[str, str] = {}
    """By URL, the names of shards that differ from their file's name (`shards.renamed`)."""

    @property
    def name(self) -> str:
        """The stage."""
        return "held-out"

    def identity(self, item: str) -> str:
        """What is computed, and the shard's name."""
        where = {"out": True, "names": True, "descriptor": True}
        model = None if self.descriptor is None else self.descriptor.fingerprint
        return fingerprint(self.model_dump(mode="json", exclude=where), model, shards.name(item))

    def open(self) -> Callable[[str], None]:
        """Load the descriptor, where there is one."""
        describe = None if self.descriptor is None else self.descriptor.open()
        return lambda url: self._shard(url, describe)

    def _shard(self, url: str, describe: Callable[[list[Image.Image]], np.ndarray] | None) -> None:
        name = self.names.get(url) or shards.name(url)
        tally, digest = Tally.zero(), shards.Digest(shards.stat(url)["version"])
        rows, vectors = [], []
        for batch in _batches(self._described(url, digest, tally)):
            rows += [_row(each) for each in batch]
            if describe is not None:
                vectors.append(describe([each.image for each in batch]))
        path = self.out / FOLDER / f"{name}.parquet"
        columns = schema(None if self.descriptor is None else self.descriptor.vectors)
        plain = pa.Table.from_pylist(rows, pa.schema([field for field in columns if field.name != "vector"]))
        if self.descriptor is not None:
            dim = self.descriptor.vectors.dim
            values = np.concatenate([np.empty((0, dim), np.float16), *vectors]).astype(np.float16)
            plain = plain.append_column("vector", pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), dim))
        with atomic(path) as file:
            pq.write_table(plain.cast(columns), file, compression="zstd")
        Ledger(self.out, self.name).commit(name, self.identity(url), [path], tally, digest.result())

    def _described(self, url: str, digest: shards.Digest, tally: Tally) -> Iterator[_Described]:
        """A picture itself and its mirror image, in the order of the shard; then the copies of some."""
        drawn: list[tuple[str, int, Sample]] = []
        for number, item in enumerate(shards.read(url, digest)):
            tally.samples["in"] += 1
            try:
                if not isinstance(item, Sample):
                    raise ImageError(item.reason)
                image = decode(item.image) if self.hashes else None
            except ImageError as error:
                tally.samples["failed"] += 1
                tally.failed[failure_class(str(error))] += 1
                continue
            tally.samples["kept"] += 1
            yield _Described(item, ITSELF, image)
            if image is None:
                continue
            yield _Described(item, MIRRORED, ImageOps.mirror(image))
            draw = hashlib.sha256(f"{self.seed} {item.uid}".encode()).hexdigest()
            heapq.heappush(drawn, (draw, number, item))
            if len(drawn) > self.copied:
                drawn.remove(max(drawn, key=lambda each: each[:2]))
                heapq.heapify(drawn)
        for _, _, sample in sorted(drawn, key=lambda each: each[:2]):
            for kind in COPIES:
                yield _Described(sample, kind, copy_of(decode(sample.image), kind))


class _Described(NamedTuple):
    """What a row is of."""

    sample: Sample
    copy: str
    image: Image.Image | None
    """None where pictures are not decoded."""


def _row(each: _Described) -> dict[str, Any]:
    sample = each.sample
    texts = {normalised(caption["text"]): None for caption in sample.captions} if each.copy == ITSELF else {}
    return {
        "key": sample.key,
        "uid": sample.uid,
        "sha256": sample.sha256,
        "copy": each.copy,
        "phash": None if each.image is None else perceptual_hash(each.image),
        "texts": [text for text in texts if text],
    }
