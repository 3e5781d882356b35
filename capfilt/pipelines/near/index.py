"""index: the vectors of a run folder with embeddings as an index on disk, for `retrieve`."""

from __future__ import annotations

from typing import Any

from capfilt import config as configs
from capfilt.config import Config
from capfilt.index.pool import Pool
from capfilt.runs.ledger import Ledger, fingerprint
from capfilt.runs.run import Run
from capfilt.stages.near.index import AREA, INDEX, build, read_info
from capfilt.stages.runner import digests
from capfilt.stages.workload import Place, Workload
from capfilt.storage.paths import StoragePath


class IndexConfig(Config):
    """What is indexed."""

    embeddings: str
    """The run folder."""


def run(place: Place, embeddings: StoragePath) -> dict[str, Any]:
    """The verb: build an index in a run folder of its own.

    Raises:
        FolderError: there are no embeddings.
        DataError: they have no vectors, or those of two models.
        RunError: the run folder is an index of others.
    """
    out, show = place.out, place.show
    with show.wait("reading the tables"):
        pool = Pool.open(embeddings, digests(Ledger(embeddings, "embed")))
    tables = fingerprint([shard.model_dump(mode="json") for shard in pool.shards])
    plan = {"verb": AREA, "embeddings": tables, "vectors": pool.model}
    Run.open(out, configs.to_yaml(IndexConfig(embeddings=str(embeddings))), plan)
    if (out / INDEX).is_file():
        info = read_info(out)
    else:
        with place.connect(AREA, Workload(len(pool.blocks), pool.num_rows)) as (session, worker):
            info = build(session, pool, embeddings, out, worker, show)
    keys = {"rows", "lists", "kind", "model", "recall"}
    return {"index": str(out), **info.model_dump(mode="json", include=keys)}
