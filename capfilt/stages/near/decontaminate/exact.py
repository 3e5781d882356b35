"""exact: the samples of shards whose bytes or texts are those of a held-out one; no picture is decoded.

Embeddings have no texts, so the shards of the pool are read for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

from capfilt.data import shards
from capfilt.data.policy import failure_class
from capfilt.data.sample import Sample
from capfilt.data.text.equality import normalised, num_words
from capfilt.runs.ledger import Ledger, fingerprint
from capfilt.runs.tally import Tally
from capfilt.stages.inputs import ShardsJob
from capfilt.stages.near.decontaminate import rows
from capfilt.stages.near.decontaminate.criteria import Criteria
from capfilt.stages.near.decontaminate.references import HeldOut, HeldOutTables
from capfilt.stages.near.decontaminate.rows import SHORT_TEXT, Suspect


class ExactJob(ShardsJob):
    """Compares shards with held-out ones, by content."""

    name: ClassVar[str] = "decontaminate-exact"
    by_content: ClassVar[bool] = True

    criteria: Criteria
    """Of which bytes (sha256) and texts are compared."""
    held_out: HeldOutTables

    def identity(self, item: str) -> str:
        """What is compared with what, and the shard's name."""
        return fingerprint(self.criteria.model_dump(mode="json"), self.held_out.identity, shards.name(item))

    def open(self) -> Callable[[str], None]:
        held_out = self.held_out.load()
        return lambda url: self._shard(url, held_out)

    def _shard(self, url: str, held_out: HeldOut) -> None:
        name = self.shard_name(url)
        found: list[Suspect] = []
        tally, digest = Tally.zero(), shards.Digest(shards.stat(url)["version"])
        for item in shards.read(url, digest):
            if not isinstance(item, Sample):
                tally.add_failed(failure_class(item.reason))
                continue
            these = list(self._suspects(item, held_out, name))
            tally.samples.update(["in", "dropped" if any(each.reason for each in these) else "kept"])
            found += these
        path = self.out / rows.FOLDER / f"{name}-exact.parquet"
        outputs = rows.write(path, found)
        Ledger(self.out, self.name).commit(name, self.identity(url), outputs, tally, digest.result())

    def _suspects(self, sample: Sample, held_out: HeldOut, shard: str) -> Iterator[Suspect]:
        """By set: equal bytes, then the first text that counts, else the first that is too short to."""
        texts = [normalised(caption["text"]) for caption in sample.captions] if self.criteria.words else []
        texts.sort(key=num_words, reverse=True)
        who = (sample.uid, sample.key, shard)
        for of_set in held_out.by_set.values():
            if self.criteria.within("sha256") is not None and sample.sha256 in of_set.row_of_sha256:
                yield Suspect.near(who, "sha256", of_set, of_set.row_of_sha256[sample.sha256], 0)
            equal = next((text for text in texts if text in of_set.row_of_text), None)
            if equal is not None:
                kind = "text" if num_words(equal) >= (self.criteria.words or 1) else SHORT_TEXT
                yield Suspect.near(who, kind, of_set, of_set.row_of_text[equal], 0)
