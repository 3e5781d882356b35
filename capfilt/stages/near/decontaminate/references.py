"""Held-out pictures: what is known of each, so that copies of them are found in a pool; all of them fit into memory.

A picture has a row for itself, one for its mirror image, which copies are often made of and whose hash is another, and
one for each copy that the self-test made of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa

from capfilt.config import Config
from capfilt.data import embeddings, parquet
from capfilt.data.embeddings import Kind, Vectors
from capfilt.storage.paths import StoragePath

FOLDER = "held-out"
"""Of the run folder: the tables of held-out pictures."""

NAMES = ("held_out_key", "held_out_uid", "held_out_sha256")
"""Columns; other names than a pool's, so that `explain` does not take a held-out picture for a sample of the run."""
ITSELF, MIRRORED = "", "mirror image"
"""What a row describes; of the self-test's copies `images.copies.COPIES`."""


def schema(vectors: Vectors | None) -> pa.Schema:
    """The columns of a table of held-out pictures; `phash` is null where pictures are compared by their bytes alone."""
    texts = [pa.field(name, pa.string(), nullable=False) for name in (*NAMES, "copy")]
    fields = [*texts, pa.field("phash", pa.uint64()), pa.field("texts", pa.list_(pa.string()))]
    return pa.schema(fields if vectors is None else [*fields, vectors.schema.field("vector")])


@dataclass(frozen=True)
class HeldOut:
    """The rows of all held-out sets; arrays have one value for each row."""

    sets: np.ndarray
    """The name of the set, object [M]."""
    keys: np.ndarray
    uids: np.ndarray
    sha256: np.ndarray
    copies: np.ndarray
    """What each row describes."""
    hashes: np.ndarray
    """uint64 [M]; [0] where there are none."""
    texts: list[list[str]]
    """Normalised, each once."""
    vectors: np.ndarray | None = None
    """float16 [M, D]."""

    @classmethod
    def read(cls, folder: StoragePath, sets: Mapping[str, str]) -> HeldOut:
        """Read the tables of a folder; `sets` has the set of each by name. DataError for one that cannot be read."""
        tables = [parquet.read(folder / f"{name}.parquet") for name in sets]
        whole = pa.concat_tables(tables)
        counts = [table.num_rows for table in tables]
        keys, uids, sha256, copies = (np.array(whole[name].to_pylist(), object) for name in (*NAMES, "copy"))
        phash = whole["phash"]
        return cls(
            sets=np.repeat(np.array(list(sets.values()), object), counts),
            keys=keys,
            uids=uids,
            sha256=sha256,
            copies=copies,
            hashes=np.empty(0, np.uint64) if phash.null_count else phash.to_numpy(),
            texts=[texts or [] for texts in whole["texts"].to_pylist()],
            vectors=embeddings.matrix(whole) if "vector" in whole.column_names else None,
        )

    def take(self, rows: np.ndarray) -> HeldOut:
        """Some rows, given as a mask or by number."""
        texts = [self.texts[number] for number in np.arange(len(self.keys))[rows]]
        arrays = {name: values for name, values in vars(self).items() if isinstance(values, np.ndarray)}
        return replace(self, texts=texts, **{name: values[rows] for name, values in arrays.items() if len(values)})

    @cached_property
    def references(self) -> HeldOut:
        """What suspects are compared with: the pictures and their mirror images."""
        return self.take((self.copies == ITSELF) | (self.copies == MIRRORED))

    @cached_property
    def by_set(self) -> dict[str, HeldOut]:
        """The references of each set, in the order of the sets."""
        return {name: self.references.take(self.references.sets == name) for name in dict.fromkeys(self.sets)}

    @cached_property
    def row_of_sha256(self) -> dict[str, int]:
        """The first row of each picture by its digest."""
        return {digest: row for row, digest in reversed(list(enumerate(self.sha256)))}

    @cached_property
    def row_of_text(self) -> dict[str, int]:
        """The first row of each text."""
        return {text: row for row, texts in reversed(list(enumerate(self.texts))) for text in texts}


class HeldOutTables(Config):
    """Where the tables of held-out pictures lie, for the workers that read them."""

    home: StoragePath
    """Their folder."""
    sets: dict[str, str]
    """The set of each table, by the table's name."""
    digest: str
    """Of the bytes of all of them."""
    vectors: Kind | None = None
    """What their vectors are."""

    @property
    def identity(self) -> dict[str, object]:
        return self.model_dump(mode="json", exclude={"home"})

    def load(self) -> HeldOut:
        """Read all of them. DataError for one that cannot be read."""
        return HeldOut.read(self.home, self.sets)
