"""decontaminate: the samples of a pool that are copies of held-out pictures or have held-out texts, in a run folder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from capfilt import config as configs
from capfilt.cluster.session import Session
from capfilt.cluster.worker_pool import Resources
from capfilt.data import embeddings, shards
from capfilt.errors import DataError, ShortfallError, UsageError
from capfilt.inference.device import Compute
from capfilt.runs.ledger import Ledger
from capfilt.runs.progress import Progress
from capfilt.runs.run import Run
from capfilt.stages import inputs
from capfilt.stages.compute import ComputeRequest, decide
from capfilt.stages.near.decontaminate import compare, rows
from capfilt.stages.near.decontaminate.compare import Pool, Settings
from capfilt.stages.near.decontaminate.criteria import Criteria
from capfilt.stages.near.embed import EmbedConfig, EmbedJob, VectorModel
from capfilt.stages.runner import digests
from capfilt.stages.workload import Place, Workload, of_shards
from capfilt.storage import documents
from capfilt.storage.atomic import sha256_file
from capfilt.storage.paths import StoragePath
from capfilt.yaml_loader import load_yaml

_NAMED = re.compile(r"([\w.-]+)=(.+)")
_UNSAFE = re.compile(r"[^\w.-]+")


@dataclass(frozen=True)
class Sources:
    """What is compared, as it was named."""

    embeddings: StoragePath
    """The run folder that has them."""
    against: Sequence[str]
    """Held-out sets: shards or a folder of pictures, as SPEC or NAME=SPEC."""
    shards: Sequence[str] = ()
    """Where the shards of the pool lie, where that is not where they were embedded."""
    model: str | None = None
    """The model that embedded the pool, where vectors are compared."""


def run(place: Place, sources: Sources, settings: Settings, fail: bool) -> dict[str, Any]:
    """The verb: returns what was found, by held-out set and kind, and what the self-test says of it.

    Raises:
        UsageError: sets that cannot be told apart, or nearness that the embeddings do not allow.
        ShortfallError: with `fail`, unless the pool is clean.
    """
    out, show = place.out, place.show
    sets = held_out_sets(sources.against)
    pool = pool_of(sources.embeddings, settings.criteria)
    if settings.criteria.words:
        pool = pool.model_copy(update={"urls": _urls(sources, list(pool.digests))})
    model = _model(sources, pool, show)
    plan = {
        "verb": "decontaminate",
        **settings.model_dump(mode="json"),
        "embeddings": str(sources.embeddings.absolute()),
        "against": sets,
        "model": None if model is None else {"kind": model.kind, "fingerprint": model.fingerprint},
    }
    opened = Run.open(out, configs.to_yaml(settings), plan)
    workload = Workload(len(pool.digests)) if model is None else of_shards([*chain.from_iterable(sets.values())])
    with place.connect("decontaminate", workload) as (session, worker):
        embed = _embed_job(session, opened, model, sources, worker, show) if settings.criteria.compares_pixels else None
        home = out.absolute()
        tables, unread = compare.describe_held_out(session, sets, settings, embed, home, worker, show)
        record = compare.compare(session, pool, tables, settings, home, worker, show)
    record |= {"contaminated": str(out / rows.TABLE), "held_out_unread": unread.samples["failed"]}
    compare.write_record(out, record)
    show.say(line := compare.verdict_line(record))
    if fail and record["verdict"] != "clean":
        raise ShortfallError(line, record)
    return record


def held_out_sets(against: Sequence[str]) -> dict[str, list[str]]:
    """The URLs of the shards of each held-out set by its name: the given one, else that of its file or folder.

    UsageError for two sets of one name.
    """
    sets: dict[str, list[str]] = {}
    for given in against:
        match = _NAMED.fullmatch(given)
        spec = match[2] if match else given
        last = spec.rstrip("/").rpartition("/")[2]
        name = match[1] if match else _UNSAFE.sub("-", shards.name(last)).strip("-") or "held-out"
        if name in sets:
            raise UsageError(f"--against {given}: another held-out set is called {name} too; write NAME={spec}.")
        sets[name] = shards.expand(spec)
    if not sets:
        raise UsageError("--against is needed: shards or a folder of pictures that no model may be trained on.")
    return sets


def pool_of(folder: StoragePath, criteria: Criteria) -> Pool:
    """The pool of a run folder's embeddings. UsageError where it lacks what is to be compared."""
    tables = embeddings.tables(folder)
    vectors = embeddings.check_same_model(tables.values()) if criteria.within("vector") is not None else None
    if criteria.within("vector") is not None and (vectors is None or criteria.vectors not in ("vector", vectors.kind)):
        raise UsageError(
            f"--by {criteria}: {folder} has {vectors or 'no vectors'}; embed the pool with such a --model, or leave"
            " that part out."
        )
    known: dict[str, str] = {}
    failed = 0
    for ledger in (Ledger(folder, stage) for stage in ("embed", "annotate")):
        known |= digests(ledger)
        failed += ledger.total().samples["failed"]
    by_name = {name: known.get(str(path.absolute())) or sha256_file(path) for name, path in tables.items()}
    return Pool(embeddings=folder.absolute(), failed=failed, digests=by_name, vectors=vectors)


def _model(sources: Sources, pool: Pool, show: Progress) -> VectorModel | None:
    """The model that embedded the pool. UsageError where it is not given, or another one is."""
    if pool.vectors is None:
        return None
    if sources.model is None:
        raise UsageError(
            f"--model is needed to embed the held-out pictures as the pool was, which has {pool.vectors}: give the"
            " model that `capfilt embed` was given."
        )
    model = VectorModel.find(sources.model, show)
    if (model.kind, model.fingerprint) != (pool.vectors.kind, pool.vectors.model):
        raise UsageError(
            f"--model {sources.model} is {model.fingerprint[:12]} ({model.kind}), and the pool has {pool.vectors}: give"
            " the model that embedded it."
        )
    return model


def _embed_job(
    session: Session, run: Run, model: VectorModel | None, sources: Sources, worker: Resources, show: Progress
) -> EmbedJob:
    """How the held-out pictures are embedded: as the pool was."""
    recipe = sources.embeddings / "recipe.yaml"
    config, compute = EmbedConfig(), Compute(device="cpu", precision="fp32")
    if model is not None:
        config = configs.validate(EmbedConfig, load_yaml(documents.check_record(recipe)), recipe)
        compute = decide(session, run, {"embed": ComputeRequest(config.precision, worker)}, show)["embed"]
    return EmbedJob(out=run.folder.absolute(), model=model, config=config, compute=compute)


def _urls(sources: Sources, names: Sequence[str]) -> dict[str, str]:
    """Where each embedded shard lies. DataError where one is not among those that are named."""
    plan: Mapping[str, Any] = Run.load(sources.embeddings).plan
    specs = list(sources.shards) or inputs.input_shards(sources.embeddings, plan)
    if not sources.shards:
        inputs.check_reachable(sources.embeddings, specs, fetch=False)
    urls = inputs.urls_by_name(plan, shards.expand(specs))
    if missing := [name for name in names if name not in urls]:
        raise DataError(
            f"shard {missing[0]} was embedded and is not among the {len(urls)} shards of {specs[0]}: its texts cannot"
            " be compared. Say with --shards where they lie, or leave text out of --by."
        )
    return {name: urls[name] for name in names}
