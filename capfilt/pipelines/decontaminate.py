"""decontaminate: the samples of a pool that are copies of held-out pictures or have held-out texts, in a run folder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from capfilt import config as configs
from capfilt.cluster.session import connect
from capfilt.data import embeddings, shards
from capfilt.errors import DataError, ShortfallError, UsageError
from capfilt.runs.ledger import Ledger
from capfilt.runs.progress import Progress
from capfilt.runs.run import Run
from capfilt.stages import inputs
from capfilt.stages.decontaminate import compare, rows
from capfilt.stages.decontaminate.compare import Pool, Settings
from capfilt.stages.runner import CommandOptions, digests
from capfilt.stages.workload import Workload, working_address
from capfilt.storage.atomic import sha256_file
from capfilt.storage.paths import StoragePath

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


def run(
    address: str,
    sources: Sources,
    out: StoragePath,
    settings: Settings,
    fail: bool,
    options: CommandOptions,
    show: Progress,
) -> dict[str, Any]:
    """The verb: returns what was found, by held-out set and kind, and what the self-test says of it.

    Raises:
        UsageError: sets that cannot be told apart, or nearness that the embeddings do not allow.
        ShortfallError: with `fail`, unless the pool is clean.
    """
    sets = held_out_sets(sources.against)
    pool = pool_of(sources, settings)
    plan = {
        "verb": "decontaminate",
        **settings.model_dump(mode="json"),
        "embeddings": str(sources.embeddings.absolute()),
        "against": sets,
    }
    opened = Run.open(out, configs.to_yaml(settings), plan)
    where = working_address(address, Workload(len(pool.digests)), options, "decontaminate", show)
    with connect(where, show=show) as session:
        worker = options.resources(session)
        tables, unread = compare.describe_held_out(session, sets, settings, out.absolute(), worker, show)
        record = compare.compare(session, pool, tables, settings, out.absolute(), worker, show)
    record |= {"contaminated": str(out / rows.TABLE), "held_out_unread": unread.samples["failed"]}
    opened.write_summary({"command": "decontaminate", **record})
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
        sets[name] = shards.expand(spec, plain_pictures=True)
    if not sets:
        raise UsageError("--against is needed: shards or a folder of pictures that no model may be trained on.")
    return sets


def pool_of(sources: Sources, settings: Settings) -> Pool:
    """The pool of a run folder's embeddings. UsageError where it lacks what is to be compared."""
    folder, criteria = sources.embeddings, settings.criteria
    tables = embeddings.tables(folder)
    vectors = embeddings.check_same_model(tables.values()) if criteria.within("vector") is not None else None
    if criteria.within("vector") is not None and (vectors is None or criteria.vectors not in ("vector", vectors.kind)):
        raise UsageError(
            f"--by {criteria}: {folder} has {vectors or 'no vectors'}; embed the pool with such a --model, or leave"
            " that part out."
        )
    known: dict[str, str] = {}
    for stage in ("embed", "annotate"):
        known |= digests(Ledger(folder, stage))
    by_name = {name: known.get(str(path.absolute())) or sha256_file(path) for name, path in tables.items()}
    urls = _urls(sources, list(by_name)) if criteria.words else {}
    return Pool(embeddings=folder.absolute(), digests=by_name, vectors=vectors, urls=urls)


def _urls(sources: Sources, names: Sequence[str]) -> dict[str, str]:
    """Where each embedded shard lies. DataError where one is not among those that are named."""
    plan: Mapping[str, Any] = Run.load(sources.embeddings).plan
    specs = list(sources.shards) or inputs.input_shards(sources.embeddings, plan)
    if not sources.shards:
        inputs.check_reachable(sources.embeddings, specs, fetch=False)
    urls = inputs.urls_by_name(plan, shards.expand(specs, plain_pictures=True))
    if missing := [name for name in names if name not in urls]:
        raise DataError(
            f"shard {missing[0]} was embedded and is not among the {len(urls)} shards of {specs[0]}: its texts cannot"
            " be compared. Say with --shards where they lie, or leave text out of --by."
        )
    return {name: urls[name] for name in names}
