"""dedup: of near pictures one is kept; the others are named, each with the kept one that stands for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from capfilt import config as configs
from capfilt.cluster.session import Session
from capfilt.cluster.worker_pool import Resources
from capfilt.config import Config
from capfilt.data import embeddings, shards
from capfilt.data.duplicates import FOLDER, STAGE
from capfilt.errors import RunError
from capfilt.index.leaders import greedy_leaders
from capfilt.index.near import Near
from capfilt.index.pool import Pool
from capfilt.runs.ledger import Ledger, fingerprint
from capfilt.runs.progress import Progress
from capfilt.runs.run import Run
from capfilt.stages import inputs
from capfilt.stages.near import dedup as stage
from capfilt.stages.near.dedup import Deduplication, Keep, Pictures
from capfilt.stages.near.pairs import find_near_pairs
from capfilt.stages.near.search import Scope
from capfilt.stages.runner import digests
from capfilt.stages.select import annotations_sha256
from capfilt.stages.workload import Place, Workload
from capfilt.storage import documents
from capfilt.storage.atomic import write_json
from capfilt.storage.paths import StoragePath


class DedupConfig(Config):
    """Which pictures are near, and which of them is kept; all of it decides what is written."""

    by: tuple[Near, ...]
    keep: Keep = "best"
    scope: Scope = "pool"
    merge_texts: bool = False
    """Whether the texts of the pictures that go are handed to those that stand for them."""

    def __str__(self) -> str:
        return ",".join(map(str, self.by))


@dataclass(frozen=True)
class Sources:
    """What a deduplication reads."""

    embeddings: StoragePath
    """A run folder with embeddings."""
    scores: StoragePath | None = None
    """A run folder with annotations, whose scores say which picture is best."""
    fetch: bool = False
    """Whether shards that lie elsewhere may be read, as the run folder with embeddings names them."""


def run(place: Place, sources: Sources, config: DedupConfig) -> dict[str, Any]:
    """The verb: find the copies in embedded shards and write who goes, and for whom, into a run folder of its own.

    Raises:
        FolderError: no embeddings there.
        RunError: embeddings that are not finished.
        DataError: vectors of two models, or none where they are compared; scores of other shards.
    """
    out, urls = place.out, embedded_shards(sources)
    pool = pool_of(sources)
    scores = None if sources.scores is None else str(sources.scores.absolute())
    plan = {
        "verb": STAGE,
        **config.model_dump(mode="json"),
        "embeddings": str(sources.embeddings.absolute()),
        "scores": scores,
    }
    opened = Run.open(out, configs.to_yaml(config), {**plan, "shards": list(urls.values())})
    if (done := finished(pool, sources, config, out)) is not None:
        return done
    with place.connect(STAGE, Workload(len(pool.shards))) as (session, worker):
        summary = deduplicate(session, pool, urls, sources, config, out, worker, place.show)
    opened.log("end", **{name: summary[name] for name in ("pictures", "kept", "dropped")})
    return summary


def pool_of(sources: Sources) -> Pool:
    """The pictures that were embedded."""
    return Pool.open(sources.embeddings, digests(Ledger(sources.embeddings, "embed")))


def finished(pool: Pool, sources: Sources, config: DedupConfig, out: StoragePath) -> dict[str, Any] | None:
    """The summary of a deduplication that is done already; None where something of it is not."""
    ledger, written = Ledger(out, STAGE), out / "summary.json"
    identities = _identities(pool, config, sources)
    if not written.is_file() or not all(ledger.completion(name, identity) for name, identity in identities.items()):
        return None
    return dict(documents.read_json(written, documents.PLAN_BYTES))


def deduplicate(
    session: Session,
    pool: Pool,
    urls: dict[str, str],
    sources: Sources,
    config: DedupConfig,
    out: StoragePath,
    resources: Resources,
    show: Progress,
) -> dict[str, Any]:
    """Write who goes of the pictures of shards, given as name -> URL, and for whom; returns the summary."""
    pairs = find_near_pairs(session, sources.embeddings, out, config.by, resources, show, config.scope)
    pictures = Pictures.read(pool, sources.scores, show)
    if reused := pictures.reused_uids():
        show.say(f"{reused:,} uids stand for pictures of different bytes; such pictures are told apart by their keys")
    kinds = [near.kind for near in config.by]  # as they were given: the first one that holds is named as the reason
    with show.wait("deciding who stands for whom"):
        leaders = greedy_leaders(pictures.order(config.keep), pairs, kinds)
    result = Deduplication(pictures, leaders, kinds)
    result.write(out, show)
    summary = {"command": STAGE, "folder": str(out / FOLDER), **result.summary()}
    if pairs.recall is not None:
        summary["recall"] = pairs.recall.model_dump(mode="json")
    if config.merge_texts:
        summary["merged_texts"] = stage.merge_texts(session, out, urls, resources, show)
    if line := stage.verdict_line(summary, str(config)):
        show.say(line)
    stage.commit(pool, out, _identities(pool, config, sources))
    write_json(out / "summary.json", summary)
    return summary


def embedded_shards(sources: Sources) -> dict[str, str]:
    """The URLs of the shards that were embedded, by their names. RunError where some are still to be."""
    tables = embeddings.tables(sources.embeddings)
    plan = Run.load(sources.embeddings).plan
    specs = inputs.input_shards(sources.embeddings, plan)
    inputs.check_reachable(sources.embeddings, specs, sources.fetch)
    urls = shards.by_name(shards.expand(specs))
    if missing := [name for name in urls if name not in tables]:
        raise RunError(
            f"{sources.embeddings} is not finished: {len(missing)} of {len(urls)} shards have no embeddings, first"
            f" {missing[0]}. Run the command again that made them."
        )
    return urls


def _identities(pool: Pool, config: DedupConfig, sources: Sources) -> dict[str, str]:
    """The fingerprint of each shard's result, which depends on all shards. DataError for a shard without scores."""
    tables = {shard.name: shard.sha256 for shard in pool.shards}
    scores = None
    if sources.scores is not None:
        stage.check_scored(sources.scores, tables)
        scores = [annotations_sha256(sources.scores / "annotations", name) for name in tables]
    whole = fingerprint(config.model_dump(mode="json"), tables, scores)
    return {name: fingerprint(whole, name) for name in tables}
