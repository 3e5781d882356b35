"""index-lists, index-split: the vectors of a run folder with embeddings as an index that is searched on disk.

The same two stages as before near pairs (`search`), each vector in its own list alone. The index holds all that a
search needs, vectors, keys, uids and where the shards are: the embeddings may be removed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from capfilt.cluster.session import Session
from capfilt.cluster.worker_pool import Resources
from capfilt.config import Config, validate
from capfilt.data import embeddings, shards
from capfilt.errors import DataError, FolderError, RunError
from capfilt.index.lists import Lists
from capfilt.index.near import Near
from capfilt.index.pool import Pool
from capfilt.index.search import VectorIndex
from capfilt.runs.progress import Progress
from capfilt.stages.near.search import LISTS, NAMES_ROWS, Search, prepare, stored
from capfilt.storage import documents
from capfilt.storage.atomic import write_json
from capfilt.storage.paths import StoragePath, table_source

AREA = "index"
INDEX = "index.json"
NAMES_BYTES = 64 * 2**20
"""Of the keys and uids of `NAMES_ROWS` pictures: 16 KB each."""
RECALL_AT = 10
"""Neighbours of a query that the recall counts."""
EXACT_BLOCKS = 8
"""Blocks in which the neighbours of the queries are searched exactly: two million rows."""


class Hit(NamedTuple):
    """One picture of a pool that is near a query."""

    cosine: float
    shard: str
    row: int
    """Of the shard's table."""
    key: str
    uid: str


class IndexInfo(Config):
    """`index.json`: what an index is of. It is written last, and makes the folder an index."""

    pool: str
    """The sha256 of its `pool.json`."""
    rows: int
    lists: int
    kind: str
    """Of the vectors: itc, clip or copy."""
    model: str
    """The fingerprint of what made the vectors."""
    model_path: str
    """Where that was when the embeddings were made; "" where they do not say."""
    embedded: dict[str, Any]
    """The settings of `embed`; none where others made the vectors."""
    shards: dict[str, str]
    """Where the shards of the pictures were, by their names."""
    recall: dict[str, float] = {}
    """Of the neighbours of some queries in some blocks, found exactly, how many a search gives; none for one list."""


def build(
    session: Session, pool: Pool, source: StoragePath, out: StoragePath, resources: Resources, show: Progress
) -> IndexInfo:
    """Write the index of a pool of embeddings, which lies in the run folder `source`, into `out`.

    Raises:
        DataError: there are no vectors, or damaged ones.
    """
    if not pool.dim:
        raise DataError(f"{source} has no vectors to search: embed with --model.")
    job = Search(out=out.absolute(), area=AREA, by=(Near(kind="vector"),), probes=1, names=True)
    job = prepare(session, stored(job, pool), pool, resources, show)
    index = _open(job, pool)
    recall = {}
    if len(index.known.queries):
        with show.wait("measuring the recall"):
            neighbours, found = index.recall(RECALL_AT, EXACT_BLOCKS)
        recall = {"queries": len(index.known.queries), "neighbours": neighbours, "found": found}
    kind, model = pool.model.split()
    info = IndexInfo(
        pool=job.pool,
        rows=pool.num_rows,
        lists=len(index.known.centroids),
        kind=kind,
        model=model,
        recall=recall,
        **_origin(source),
    )
    write_json(out / INDEX, info.model_dump(mode="json"))
    return info


def _origin(source: StoragePath) -> dict[str, Any]:
    """Where the pictures of embeddings were, and the model."""
    plan = documents.read_json(source / "plan.json", documents.PLAN_BYTES)
    model = source / embeddings.MODEL
    said = documents.read_json(model) if model.is_file() else {}
    urls = [url for url in plan.get("shards", []) if isinstance(url, str)]
    embedded = plan.get("config", {}) if plan.get("verb") == "embed" else {}
    return {"shards": shards.by_name(urls), "model_path": str(said.get("path", "")), "embedded": embedded}


def read_info(folder: StoragePath) -> IndexInfo:
    """What an index is of. FolderError where the folder is none, or one that is not finished."""
    if not (folder / INDEX).is_file():
        raise FolderError(f"{folder} is no index, or not finished: run `capfilt index E --out {folder}` (again).")
    return validate(IndexInfo, documents.read_json(folder / INDEX, documents.PLAN_BYTES), folder / INDEX)


class PictureIndex:
    """An index that was built, to search in."""

    def __init__(self, folder: StoragePath) -> None:
        """Open it.

        Raises:
            FolderError: the folder is no index, or one that is not finished.
            RunError: it is damaged.
        """
        self.info = read_info(folder)
        self.job = Search(out=folder, area=AREA, by=(Near(kind="vector"),), pool=self.info.pool)
        self.pool = self.job.load()
        self.vectors = _open(self.job, self.pool)

    def search(self, query: np.ndarray, wanted: int) -> list[Hit]:
        """The pictures nearest to a query, float [D], the nearest first."""
        rows, cosines = self.vectors.search(query, wanted)
        return [self._hit(row, cosine) for row, cosine in zip(rows.tolist(), cosines.tolist(), strict=True)]

    def _hit(self, row: int, cosine: float) -> Hit:
        """The picture of a row of the pool; of its block's names only some are read."""
        starts, blocks = self.pool.starts, self.pool.blocks
        block = [name for name, block in blocks.items() if starts[block[0].name] <= row][-1]
        shard = [one for one in blocks[block] if starts[one.name] <= row][-1]
        path = self.job.names_path(block)
        place = row - starts[blocks[block][0].name]
        try:
            # As dictionaries: of a table that others made, one long text may be that of all rows.
            file: Any = pq.ParquetFile(table_source(path), read_dictionary=["key", "uid"])
            group = file.metadata.row_group(place // NAMES_ROWS)
            if group.total_byte_size > NAMES_BYTES:
                raise OSError(f"{group.total_byte_size:,} bytes of names")
            names = file.read_row_group(place // NAMES_ROWS).slice(place % NAMES_ROWS, 1).to_pylist()[0]
        except (OSError, IndexError, pa.ArrowException) as error:
            raise RunError(f"{path} is damaged; remove the index and build it again.") from error
        return Hit(cosine, shard.name, row - self.pool.starts[shard.name], names["key"], names["uid"])


def _open(job: Search, pool: Pool) -> VectorIndex:
    return VectorIndex(Lists.load(job.work / LISTS), [job.path(job.by[0], block) for block in pool.blocks])
