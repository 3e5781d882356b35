"""near: the embeddings of a pool against held-out pictures; no picture is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

import numpy as np
import pyarrow as pa

from capfilt.config import Config
from capfilt.data import embeddings
from capfilt.index.nearest import NOTHING, nearest_hashes, nearest_vectors
from capfilt.runs.ledger import Ledger, fingerprint
from capfilt.runs.tally import Tally
from capfilt.stages.near.decontaminate import rows
from capfilt.stages.near.decontaminate.criteria import Criteria
from capfilt.stages.near.decontaminate.references import HeldOut, HeldOutTables
from capfilt.stages.near.decontaminate.rows import Suspect
from capfilt.storage.paths import StoragePath


class NearJob(Config):
    """Compares a pool's embeddings with held-out pictures; an item is the name of a shard."""

    name: ClassVar[str] = "decontaminate"
    unit: ClassVar[str] = "shards"

    out: StoragePath
    embeddings: StoragePath
    """The run folder that has them."""
    digests: dict[str, str]
    """The sha256 of each shard's embeddings."""
    criteria: Criteria
    held_out: HeldOutTables

    def identity(self, item: str) -> str:
        """What is compared with what, and how."""
        return fingerprint(self.criteria.model_dump(mode="json"), self.held_out.identity, item, self.digests[item])

    def open(self) -> Callable[[str], None]:
        held_out = self.held_out.load()

        def work(item: str) -> None:
            table = embeddings.read(embeddings.path_of(self.embeddings, item), self.compares_vectors)
            found = list(self._suspects(table, held_out, item))
            path, tally = self.out / rows.FOLDER / f"{item}.parquet", Tally.zero()
            outputs = rows.write(path, found)
            dropped = len({suspect.key for suspect in found})
            tally.samples.update({"in": table.num_rows, "kept": table.num_rows - dropped, "dropped": dropped})
            Ledger(self.out, self.name).commit(item, self.identity(item), outputs, tally)

        return work

    @property
    def compares_vectors(self) -> bool:
        return self.criteria.within("vector") is not None

    def _suspects(self, table: pa.Table, held_out: HeldOut, shard: str) -> Iterator[Suspect]:
        """The suspects of a shard, in its order; of one sample by set, and by kind."""
        columns = [table[name].to_pylist() for name in ("uid", "key")]
        found: list[tuple[int, Suspect]] = []
        for of_set in held_out.by_set.values():
            for kind, nearest, distances in self._nearest(table, of_set):
                for number in np.flatnonzero(nearest != NOTHING):
                    who = (columns[0][number], columns[1][number], shard)
                    near = Suspect.near(who, kind, of_set, int(nearest[number]), distances[number])
                    found.append((int(number), near))
        return (suspect for _, suspect in sorted(found, key=lambda each: each[0]))

    def _nearest(self, table: pa.Table, of_set: HeldOut) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """For each kind: the row of the nearest held-out picture of each sample, and the distances."""
        if self.criteria.within("sha256") is not None:
            digests = table["sha256"].to_pylist()
            nearest = np.array([of_set.row_of_sha256.get(digest, NOTHING) for digest in digests], np.int64)
            yield "sha256", nearest, np.zeros(len(digests))
        if (bits := self.criteria.within("phash")) is not None:
            yield "phash", *nearest_hashes(table["phash"].to_numpy(), of_set.hashes, int(bits))
        if (within := self.criteria.within("vector")) is not None and of_set.vectors is not None:
            nearest, cosines = nearest_vectors(embeddings.matrix(table), of_set.vectors, 1 - within)
            yield self.held_out.vectors or "vector", nearest, 1 - cosines
