"""select: a policy turns annotations into a cleaned dataset; no model is touched.

One shard and its annotations in; one cleaned tar (image bytes as they came) and one Parquet of verdicts out. The
Parquet has a row for
every text that came in, so what was dropped, and why, stays known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import capfilt.data.annotations as tables
from capfilt import config as configs
from capfilt.cluster.session import Session
from capfilt.cluster.spread import Resources
from capfilt.config import Config
from capfilt.data import shards
from capfilt.data.annotations import Annotation
from capfilt.data.policy import PolicyConfig, judge, keep_rate_threshold
from capfilt.data.sample import Sample
from capfilt.errors import DataError, RunError, UsageError
from capfilt.models import weights
from capfilt.pipelines.calibrate import CalibrateJob, calibrate
from capfilt.pipelines.stage import run_stage
from capfilt.reports.ledger import Ledger, atomic, fingerprint
from capfilt.reports.progress import Progress
from capfilt.reports.run import Run
from capfilt.reports.tally import Tally

VERDICTS = tables.SCHEMA.append(pa.field("verdict", pa.string())).append(pa.field("why", pa.string()))
"""The annotations' columns, then kept | dropped | failed, and the reason."""


Outcomes = dict[tuple[str, str], list[Annotation]]
"""Rows by (key, status): where a shard has a key twice, the first may be a sample and the second a failure."""


class SelectJob(Config):
    """What a selecting worker needs to know."""

    out: Path
    """The folder of `annotations/`, `dataset/` and `ledger/`."""
    annotations: Path
    score: str
    threshold: float

    @property
    def name(self) -> str:
        """The stage."""
        return "select"

    def identity(self, item: str) -> str:
        """The policy, the shard, and the annotations by which it is judged."""
        scores = shards.content(str(self.annotations / f"{shards.name(item)}.parquet"))
        return fingerprint({"score": self.score, "threshold": self.threshold}, shards.stat(item), scores)

    def open(self) -> Callable[[str], str]:
        """Nothing to load."""
        return self.shard

    def shard(self, url: str) -> str:
        """Judge one shard, write what is kept, and commit it."""
        name = shards.name(url)
        table = tables.read(self.annotations / f"{name}.parquet")
        rows = list(tables.rows(table))
        judged = _by_outcome(rows)
        folder = self.out / "dataset"
        folder.mkdir(parents=True, exist_ok=True)
        tar, verdicts = folder / f"{name}.tar", folder / f"{name}.parquet"
        shards.write(tar, self._kept(url, judged))
        whys = [judge(row, self.score, self.threshold) for row in rows]
        with atomic(verdicts) as file:
            pq.write_table(_verdicts(table, rows, whys), file, compression="zstd")
        tally = _tally(judged, rows, whys)
        Ledger(self.out, self.name).commit(name, self.identity(url), [tar, verdicts], tally)
        return f"{tally.samples['kept']} of {tally.samples['in']} images kept"

    def _kept(self, url: str, judged: Outcomes) -> Iterator[Sample]:
        """The samples with at least one kept text, in the shard's order, their captions replaced by the kept ones."""
        for item in shards.read(url):
            if not isinstance(item, Sample):
                continue
            own = judged.get((item.key, "ok"))
            if own is None:
                raise DataError(f"{url}: key {item.key} has no annotation; annotate this shard again")
            kept = [row for row in own if not judge(row, self.score, self.threshold)]
            if not kept:
                continue
            captions = [
                {"text": row.text, "source": row.source, "itm": row.itm, "itc": row.itc, "round": row.round}
                for row in kept
            ]
            meta = {**item.meta, "uid": item.uid, "sha256": item.sha256, "captions": captions}
            yield Sample(item.key, item.image, item.extension, kept[0].text, meta)


def _by_outcome(rows: Sequence[Annotation]) -> Outcomes:
    outcomes: Outcomes = {}
    for row in rows:
        outcomes.setdefault((row.key, row.status), []).append(row)
    return outcomes


def _verdicts(table: pa.Table, rows: Sequence[Annotation], whys: Sequence[str]) -> pa.Table:
    verdicts = [
        "failed" if row.status == "failed" else "dropped" if why else "kept"
        for row, why in zip(rows, whys, strict=True)
    ]
    return table.append_column("verdict", pa.array(verdicts)).append_column("why", pa.array(list(whys))).cast(VERDICTS)


def _tally(judged: Outcomes, rows: Sequence[Annotation], whys: Sequence[str]) -> Tally:
    tally = Tally.zero()
    verdict_of = {id(row): why for row, why in zip(rows, whys, strict=True)}
    for own in judged.values():
        tally.samples["in"] += 1
        if own[0].status == "failed":
            tally.samples["failed"] += 1
            tally.failed[own[0].reason.partition(":")[0]] += 1
            continue
        tally.samples["kept" if any(not verdict_of[id(row)] for row in own) else "dropped"] += 1
        for row in own:
            why = verdict_of[id(row)]
            tally.texts["in"][row.source] += 1
            if why:
                tally.texts["dropped"][f"{row.source}: {why}"] += 1
            else:
                tally.texts["kept"][row.source] += 1
    return tally


def resolve_threshold(policy: PolicyConfig, folder: Path, names: Sequence[str], calibrated: float | None) -> float:
    """The number that a policy stands for, here and now."""
    if policy.threshold == "keep-rate":
        columns = (
            tables.read(folder / f"{name}.parquet").column(policy.score).drop_null().to_numpy() for name in names
        )
        return keep_rate_threshold((column.astype(np.float64) for column in columns), policy.keep_rate)
    if policy.threshold == "calibrated":
        if calibrated is None:
            raise RunError(
                'the policy\'s threshold is "calibrated", and there is no calibration: '
                'give validation pairs (--val), a number, or "keep-rate"'
            )
        return calibrated
    return float(policy.threshold)


def select(
    session: Session,
    urls: Sequence[str],
    job: SelectJob,
    resources: Resources,
    show: Progress,
    label: str = "select",
) -> Tally:
    """Write the cleaned shards; returns what was kept, dropped and failed."""
    named = shards.by_name(urls)
    total = run_stage(session, job, named, resources, show, label)
    ledger = Ledger(job.out, job.name)
    counts = {f"{done.shard}.tar": done.tally.samples["kept"] for done in ledger.completions() if done.shard in named}
    shards.write_sizes(job.out / "dataset", counts)
    if not total.samples["kept"]:
        raise RunError(
            f"{label}: the policy kept none of {total.texts['in'].total()} texts "
            f"at {job.score} >= {job.threshold:.4f}; lower the threshold"
        )
    return total


def run(
    session: Session,
    specs: Sequence[str],
    source: Path,
    out: Path,
    sets: Sequence[str],
    calibration: tuple[str | None, Path | None],
    show: Progress,
) -> dict[str, Any]:
    """The verb: judge annotated shards by a policy and write the cleaned ones into a run folder of its own."""
    policy = configs.build(PolicyConfig, sets)
    urls = shards.expand(specs)
    folder = source / "annotations"
    if not folder.is_dir():
        raise DataError(
            f"{source} holds no annotations/; give the --out of `capfilt annotate` or a round of a bootstrap"
        )
    for name in shards.by_name(urls):
        if not (folder / f"{name}.parquet").is_file():
            raise DataError(f"shard {name} has no annotations in {folder}; annotate it first")
    plan = {
        "verb": "select",
        **policy.model_dump(mode="json"),
        "shards": urls,
        "annotations": str(source.absolute()),
    }
    Run.open(out, configs.to_yaml(policy), plan)
    threshold = resolve_threshold(policy, folder, urls, _calibrated(session, policy, calibration, out, show))
    job = SelectJob(out=out.absolute(), annotations=folder.absolute(), score=policy.score, threshold=threshold)
    tally = select(session, urls, job, Resources(), show)
    return {"dataset": str(out / "dataset"), "threshold": threshold, **tally.to_json()}


def _calibrated(
    session: Session,
    policy: PolicyConfig,
    calibration: tuple[str | None, Path | None],
    out: Path,
    show: Progress,
) -> float | None:
    val, judge = calibration
    if policy.threshold != "calibrated":
        return None
    if val is None or judge is None:
        raise UsageError("threshold=calibrated needs --val SHARDS and --filter MODEL; or set threshold to a number")
    job = CalibrateJob(
        out=out.absolute(),
        model=weights.find(str(judge)),
        shards=tuple(shards.expand(val)),
        score=policy.score,
        recall=policy.recall,
    )
    return calibrate(session, job, Resources(), show)
