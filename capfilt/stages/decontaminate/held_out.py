"""held-out: what decontamination needs to know of held-out pictures, and copies of some of them for its self-test.

One shard of held-out pictures in, one table of `references` out. Which pictures are copied depends on the seed and on
their uids alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import ImageOps

from capfilt.config import Config
from capfilt.data import shards
from capfilt.data.images.copies import COPIES, copy_of
from capfilt.data.images.decode import decode
from capfilt.data.images.perceptual_hash import perceptual_hash
from capfilt.data.policy import failure_class
from capfilt.data.sample import Sample
from capfilt.data.text.equality import normalised
from capfilt.errors import ImageError
from capfilt.runs.ledger import Ledger, fingerprint
from capfilt.runs.tally import Tally
from capfilt.stages.decontaminate.references import FOLDER, ITSELF, MIRRORED, schema
from capfilt.storage.atomic import atomic
from capfilt.storage.paths import StoragePath


class HeldOutJob(Config):
    """The job that describes held-out pictures."""

    by_content: ClassVar[bool] = True
    only_reads: ClassVar[bool] = True

    out: StoragePath
    pixels: bool = True
    """Whether pictures are decoded and hashed; else their bytes are, and nothing is copied."""
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
        return fingerprint(self.model_dump(mode="json", exclude={"out", "names"}), shards.name(item))

    def open(self) -> Callable[[str], None]:
        """Nothing to load."""
        return self._shard

    def _shard(self, url: str) -> None:
        name = self.names.get(url) or shards.name(url)
        tally, digest = Tally.zero(), shards.Digest(shards.stat(url)["version"])
        rows = list(self._rows(url, digest, tally))
        path = self.out / FOLDER / f"{name}.parquet"
        with atomic(path) as file:
            pq.write_table(pa.Table.from_pylist(rows, schema(None)), file, compression="zstd")
        Ledger(self.out, self.name).commit(name, self.identity(url), [path], tally, digest.result())

    def _rows(self, url: str, digest: shards.Digest, tally: Tally) -> Iterator[dict[str, Any]]:
        """A picture itself and its mirror image, in the order of the shard; then the copies of some."""
        drawn: list[tuple[str, Sample]] = []
        for item in shards.read(url, digest):
            tally.samples["in"] += 1
            try:
                if not isinstance(item, Sample):
                    raise ImageError(item.reason)
                image = decode(item.image) if self.pixels else None
            except ImageError as error:
                tally.samples["failed"] += 1
                tally.failed[failure_class(str(error))] += 1
                continue
            tally.samples["kept"] += 1
            if image is None:
                yield _row(item, ITSELF, None)
                continue
            yield _row(item, ITSELF, perceptual_hash(image))
            yield _row(item, MIRRORED, perceptual_hash(ImageOps.mirror(image)))
            draw = hashlib.sha256(f"{self.seed} {item.uid} {item.key}".encode()).hexdigest()
            drawn = sorted([*drawn, (draw, item)], key=itemgetter(0))[: self.copied]
        for _, sample in drawn:
            original = decode(sample.image)
            for kind in COPIES:
                yield _row(sample, kind, perceptual_hash(decode(copy_of(original, kind))))


def _row(sample: Sample, copy: str, phash: int | None) -> dict[str, Any]:
    texts = {normalised(caption["text"]): None for caption in sample.captions} if copy == ITSELF else {}
    names = {"key": sample.key, "uid": sample.uid, "sha256": sample.sha256, "copy": copy}
    return {**names, "phash": phash, "texts": [text for text in texts if text]}
