"""The whole of a decontamination over a session: held-out sets, self-test, the pool, one table, one record.

The self-test is said before the pool is compared, and only a pool in which nothing was found by kinds of nearness that
passed it is called clean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from capfilt.cluster.session import Session
from capfilt.cluster.worker_pool import Resources
from capfilt.config import Config
from capfilt.data import embeddings, parquet, shards
from capfilt.data.embeddings import Vectors
from capfilt.errors import DataError
from capfilt.runs.ledger import Ledger, fingerprint
from capfilt.runs.progress import Progress
from capfilt.runs.tally import Tally
from capfilt.stages.near.decontaminate import rows, self_test
from capfilt.stages.near.decontaminate.criteria import Criteria
from capfilt.stages.near.decontaminate.exact import ExactJob
from capfilt.stages.near.decontaminate.held_out import HeldOutJob
from capfilt.stages.near.decontaminate.near import NearJob
from capfilt.stages.near.decontaminate.references import FOLDER, ITSELF, HeldOut, HeldOutTables
from capfilt.stages.near.embed import EmbedJob
from capfilt.stages.runner import digests, run_stage
from capfilt.storage import documents
from capfilt.storage.atomic import write_json
from capfilt.storage.paths import StoragePath

CLIP_RECALL = (
    "DataComp (2023, appendix F) measured a recall of 0.02 for CLIP's vectors at a precision of 0.9: a copy-detection"
    " descriptor (copy:0.604) found 0.8"
)


class Settings(Config):
    """How a pool is compared."""

    criteria: Criteria
    self_test: int = 200
    """Held-out pictures of which copies are made."""
    seed: int = 0


def describe_held_out(
    session: Session,
    sets: Mapping[str, Sequence[str]],
    settings: Settings,
    embed: EmbedJob | None,
    out: StoragePath,
    resources: Resources,
    show: Progress,
) -> tuple[HeldOutTables, Tally]:
    """Describe the held-out sets, given as the URLs of their shards by name; `embed` as in `HeldOutJob`.

    Raises:
        NoShardError: a shard is in two of them.
        DataError: no picture of a set can be read.
    """
    named = shards.by_name([url for urls in sets.values() for url in urls])
    set_of = {url: name for name, urls in sets.items() for url in urls}
    job = HeldOutJob(
        out=out,
        embed=embed,
        copied=0 if embed is None else math.ceil(settings.self_test / len(named)),
        seed=settings.seed,
        names=shards.renamed(named),
    )
    tally = run_stage(session, job, named, resources, show, "held-out pictures")
    ledger = Ledger(out, job.name)
    kept = {done.shard: done.tally.samples["kept"] for done in ledger.completions()}
    for name, urls in sets.items():
        if not sum(kept[shard] for shard, url in named.items() if url in urls):
            raise DataError(f"the held-out set {name}: none of its pictures can be read; `capfilt status` says why.")
    tables = {shard: set_of[url] for shard, url in named.items()}
    written = digests(ledger)
    contents = [written[str((out / FOLDER / f"{shard}.parquet").absolute())] for shard in tables]
    kind = None if embed is None or embed.model is None else embed.model.kind
    return HeldOutTables(home=(out / FOLDER).absolute(), sets=tables, digest=fingerprint(contents), vectors=kind), tally


class Pool(Config):
    """What is compared with held-out sets."""

    embeddings: StoragePath
    """The run folder that has them."""
    failed: int = 0
    """Samples that could not be embedded."""
    digests: dict[str, str]
    """The sha256 of each shard's embeddings, by the shard's name."""
    vectors: Vectors | None = None
    """What their vectors are."""
    urls: dict[str, str] = {}
    """Where each shard lies, for its texts."""


def compare(
    session: Session,
    pool: Pool,
    tables: HeldOutTables,
    settings: Settings,
    out: StoragePath,
    resources: Resources,
    show: Progress,
) -> dict[str, Any]:
    """Test what would be found, then compare every shard of the pool and write `rows.TABLE`; returns the record."""
    criteria = settings.criteria
    held_out = tables.load()
    tests = self_test.run(held_out, criteria, tables.vectors)
    for line in self_test_lines(tests):
        show.say(line)
    near = NearJob(out=out, embeddings=pool.embeddings, digests=pool.digests, criteria=criteria, held_out=tables)
    tally = run_stage(session, near, {name: name for name in pool.digests}, resources, show, "compare pictures")
    stages = [near.name]
    if criteria.words:
        texts = exact_job(criteria.texts_alone, tables, pool.urls, out)
        run_stage(session, texts, pool.urls, resources, show, "compare texts")
        stages.append(texts.name)
    counts = rows.merge(out, stages)
    found = record(settings, held_out, tests, counts, tally.samples["in"], pool.failed)
    if pool.failed and criteria.words:
        unread = _not_embedded(out, pool.embeddings)
        found["samples"] |= {name: found["samples"][name] + n for name, n in (("kept", unread), ("failed", -unread))}
    return found


def _not_embedded(out: StoragePath, pool: StoragePath) -> int:
    """How many samples have a held-out text and a picture that cannot be read: they are dropped, and no more failed."""
    keys: dict[str, set[str]] = {}
    for row in rows.read(out / rows.TABLE):
        keys.setdefault(row["shard"], set()).add(row["key"])
    tables = {name: parquet.read(embeddings.path_of(pool, name), ["key"]) for name in keys}
    return sum(len(those - set(tables[name]["key"].to_pylist())) for name, those in keys.items())


def exact_job(criteria: Criteria, tables: HeldOutTables, urls: Mapping[str, str], out: StoragePath) -> ExactJob:
    """The job that reads shards, given as name -> URL."""
    return ExactJob(out=out, criteria=criteria, held_out=tables, names=shards.renamed(urls))


def record(
    settings: Settings,
    held_out: HeldOut,
    tests: Sequence[self_test.SelfTest],
    counts: rows.Counts,
    compared: int,
    failed: int,
) -> dict[str, Any]:
    """What summary.json and --json say."""
    dropped, problems = counts.samples[""], {test.kind: test.problem for test in tests if test.problem}
    sets = {
        name: {
            "pictures": int((of_set.copies == ITSELF).sum()),
            "texts": len(of_set.row_of_text),
            "in_pool": len(counts.pictures.get(name, ())),
            "samples": dict(sorted(counts.by_set.get(name, {}).items())),
        }
        for name, of_set in held_out.by_set.items()
    }
    return {
        "by": str(settings.criteria),
        "verdict": "contaminated" if dropped else "unknown" if problems else "clean",
        "samples": {"in": compared + failed, "kept": compared - dropped, "dropped": dropped, "failed": failed},
        "short_texts": counts.samples[rows.SHORT_TEXT],
        "sets": sets,
        "self_test": {test.kind: test.record() for test in tests},
        "problems": problems,
    }


def write_record(out: StoragePath, record: Mapping[str, Any]) -> None:
    """Write summary.json, unless it says the same already: a rerun changes no file."""
    path, tree = out / "summary.json", {"command": "decontaminate", **record}
    if not path.is_file() or documents.read_json(path) != tree:
        write_json(path, tree)


def self_test_lines(tests: Sequence[self_test.SelfTest]) -> list[str]:
    """What the self-test found, for a person."""
    lines = []
    for test in tests:
        recall = ", ".join(f"{copy} {share:.1%}" for copy, share in test.recall.items())
        lines.append(
            f"self-test of {test.kind}: of copies of {test.pictures} held-out pictures it finds {recall}; "
            f"{test.confused:.1%} have another held-out picture as near"
        )
        if test.problem:
            lines.append(f"self-test of {test.kind}: {test.problem}. What it does not find may be there all the same.")
        if test.kind in ("clip", "itc"):
            lines.append(f"note: {test.kind} vectors are not made for this: {CLIP_RECALL}.")
    return lines


def verdict_line(record: Mapping[str, Any]) -> str:
    """The result in one line."""
    samples, by, problems = record["samples"], record["by"], "; ".join(record["problems"].values())
    if samples["dropped"]:
        found = ", ".join(f"{each['in_pool']:,} of {name}" for name, each in record["sets"].items() if each["in_pool"])
        line = f"contaminated: {samples['dropped']:,} of {samples['in']:,} samples ({by}); held-out pictures: {found}"
        return f"{line}; of little worth: {problems}" if problems else line
    if problems:
        return f"nothing found by {by}, which proves nothing: {problems}"
    return f"clean by {by}: none of {samples['in']:,} samples; the self-test says which copies that would have shown"
