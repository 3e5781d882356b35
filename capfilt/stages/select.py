"""select: a policy turns annotations into a cleaned dataset; no model is touched.

One shard and its annotations in; one cleaned tar (image bytes as they came) and one Parquet of verdicts out. The
Parquet has a row for every text that came in, so what was dropped, and why, stays known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import capfilt.data.annotations as tables
from capfilt.cluster.session import Session
from capfilt.cluster.worker_pool import Resources
from capfilt.config import Config
from capfilt.data import shards
from capfilt.data.annotations import Annotation
from capfilt.data.policy import PolicyConfig, Rule, best, failure, judge, keep_rate_threshold
from capfilt.data.sample import Sample
from capfilt.data.shards.members import CARRIED, Members
from capfilt.errors import DataError, ShortfallError
from capfilt.runs import balance
from capfilt.runs.ledger import Ledger, fingerprint
from capfilt.runs.progress import Progress
from capfilt.runs.tally import Tally
from capfilt.stages.runner import check_success, run_stage
from capfilt.storage import documents, write_guard
from capfilt.storage.atomic import atomic, sha256_file
from capfilt.storage.paths import StoragePath

VERDICTS = tables.SCHEMA.append(pa.field("verdict", pa.string())).append(pa.field("why", pa.string()))
"""The annotations' columns, then kept | dropped | failed, and the reason."""


Outcomes = dict[tuple[str, str], list[tuple[Annotation, str]]]
"""Rows with why they go, by (key, status): of a key that a shard has twice the first may be a sample, the second a
failure."""


class SelectJob(Config):
    """What a selecting worker needs to know."""

    by_content: ClassVar[bool] = True

    out: StoragePath
    """The folder of `annotations/`, `dataset/` and `ledger/`."""
    annotations: StoragePath
    rule: Rule
    carry: bool = True
    """Whether kept samples take along what else lay under their key."""
    names: dict[str, str] = {}
    """By its url, the name of a shard that is not called as its file is (`shards.renamed`)."""

    @property
    def name(self) -> str:
        """The stage."""
        return "select"

    def identity(self, item: str) -> str:
        """The policy, the shard, and the annotations by which it is judged."""
        scores = annotated(self.annotations, self._called(item))
        settings = {**self.rule.model_dump(mode="json"), "carry": self.carry}
        return fingerprint(settings, shards.name(item), scores)

    def open(self) -> Callable[[str], str]:
        """Nothing to load."""
        return self.shard

    def shard(self, url: str) -> str:
        """Judge one shard, write what is kept, and commit it."""
        name = self._called(url)
        table = tables.read(self.annotations / f"{name}.parquet")
        rows = list(tables.rows(table))
        whys = verdicts(rows, self.rule)
        judged = _by_outcome(rows, whys)
        folder = self.out / "dataset"
        documents.make_folder(folder)
        tar, table_path = folder / f"{name}.tar", folder / f"{name}.parquet"
        digest, members = shards.Digest(shards.stat(url)["version"]), Members()
        kept, tally = self._kept(url, judged, digest, members), _tally(judged)
        if tally.samples["kept"]:
            shards.write(tar, kept)
        else:  # an empty tar is one that other people's loaders stop at
            written = sum(1 for _ in kept)
            assert not written, "the tally says that nothing is kept"
            write_guard.confirm(tar)
            documents.unlink(tar)
        with atomic(table_path) as file:
            pq.write_table(_verdicts(table, rows, whys), file, compression="zstd")
        if not self.carry:
            members["not carried"] += members.pop(CARRIED, 0)
        tally.members.update(members)
        outputs = [tar, table_path] if tally.samples["kept"] else [table_path]
        Ledger(self.out, self.name).commit(name, self.identity(url), outputs, tally, digest.taken())
        return f"{tally.samples['kept']} of {tally.samples['in']} images kept"

    def _called(self, url: str) -> str:
        return self.names.get(url) or shards.name(url)

    def _kept(self, url: str, judged: Outcomes, digest: shards.Digest, members: Members) -> Iterator[Sample]:
        """The samples with at least one kept text, in the shard's order, their captions replaced by the kept ones."""
        for item in shards.read(url, digest, members, extras=self.carry):
            if not isinstance(item, Sample):
                continue
            own = judged.get((item.key, "ok"))
            if own is None:
                if (item.key, "failed") in judged:  # its picture could not be decoded
                    continue
                raise DataError(f"{url}: key {item.key} has no annotation; annotate this shard again")
            kept = [row for row, why in own if not why]
            if not kept:
                continue
            captions = [
                {"text": row.text, "source": row.source, "itm": row.itm, "itc": row.itc, "round": row.round}
                for row in kept
            ]
            meta = {**item.meta, "uid": item.uid, "sha256": item.sha256, "captions": captions}
            yield replace(item, text=best(kept, self.rule).text, meta=meta)


def verdicts(rows: Sequence[Annotation], rule: Rule) -> list[str]:
    """Why each row is dropped, or ""; the rows of an image are judged together, and stand together."""
    return [why for _, own in groupby(rows, key=lambda row: (row.key, row.status)) for why in judge(list(own), rule)]


def annotated(folder: StoragePath, name: str) -> str:
    """The sha256 of a shard's annotations: as it was committed, if they were; a plan must not read all of them."""
    path, ledger = folder / f"{name}.parquet", Ledger(folder.parent, "annotate")
    done = ledger.read(ledger.path / f"{name}.json")
    known = {out.path: out.sha256 for out in done.outputs} if done and not ledger.doubt(done) else {}
    return known.get(f"{folder.name}/{path.name}") or sha256_file(path)


def _by_outcome(rows: Sequence[Annotation], whys: Sequence[str]) -> Outcomes:
    outcomes: Outcomes = {}
    for row, why in zip(rows, whys, strict=True):
        outcomes.setdefault((row.key, row.status), []).append((row, why))
    return outcomes


def _verdicts(table: pa.Table, rows: Sequence[Annotation], whys: Sequence[str]) -> pa.Table:
    found = [
        "failed" if row.status == "failed" else "dropped" if why else "kept"
        for row, why in zip(rows, whys, strict=True)
    ]
    return table.append_column("verdict", pa.array(found)).append_column("why", pa.array(list(whys))).cast(VERDICTS)


def _tally(judged: Outcomes) -> Tally:
    tally = Tally.zero()
    for (_, status), own in judged.items():
        # A row of a failure is a sample; the rows of a sample that was read are its texts.
        if status == "failed":
            tally.failed.update(failure(row.reason) for row, _ in own)
            tally.samples.update({"in": len(own), "failed": len(own)})
            continue
        tally.samples.update(["in", "dropped" if all(why for _, why in own) else "kept"])
        for row, why in own:
            tally.texts["in"][row.source] += 1
            if why:
                tally.texts["dropped"][f"{row.source}: {why}"] += 1
            else:
                tally.texts["kept"][row.source] += 1
    return tally


def resolve_threshold(
    policy: PolicyConfig, folder: StoragePath, names: Iterable[str], calibrated: float | None
) -> float | None:
    """The number that a policy stands for, here and now, or none; `folder` has the annotations of the shards."""
    if policy.threshold == "keep-rate":
        columns = (
            tables.read(folder / f"{name}.parquet").column(policy.score).drop_null().to_numpy() for name in names
        )
        return keep_rate_threshold((column.astype(np.float64) for column in columns), policy.keep_rate)
    if policy.threshold == "calibrated":
        assert calibrated is not None, "whoever reads the policy calibrates"
        return calibrated
    return policy.threshold


def select(
    session: Session,
    named: Mapping[str, str],
    job: SelectJob,
    resources: Resources,
    show: Progress,
    label: str = "select",
) -> Tally:
    """Write the cleaned shards, given by their names; returns what was kept, dropped and failed."""
    job = job.model_copy(update={"names": shards.renamed(named)})
    total = run_stage(session, job, named, resources, show, label)
    balance.check(Ledger(job.annotations.parent, "annotate"), Ledger(job.out, job.name), named)
    done = Ledger(job.out, job.name).completions()
    kept = {f"{d.shard}.tar": d.tally.samples["kept"] for d in done if d.shard in named}
    write_sizes(job.out / "dataset", {tar: samples for tar, samples in kept.items() if samples})
    return total


def check_selected(
    label: str, tally: Tally, rule: Rule, least: float = 0, result: dict[str, Any] | None = None
) -> None:
    """Raise ShortfallError where a policy kept nothing, or where too few of the samples could be judged at all."""
    check_success(label, tally, least, result)
    if not tally.samples["kept"]:
        raise ShortfallError(
            f"{label}: the policy kept none of {sum(tally.judged().values())} texts at {rule};"
            " ask for less, in another --out.",
            result,
        )


def write_sizes(folder: StoragePath, counts: dict[str, int]) -> None:
    """Write sizes.json beside the tars, unless it says so already: a rerun touches nothing."""
    path = folder / "sizes.json"
    if not path.is_file() or documents.read_json(path, documents.PLAN_BYTES) != counts:
        shards.write_sizes(folder, counts)
