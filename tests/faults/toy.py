"""The job that the faults hit: it reads shards and writes tables as annotate does, and needs no model.

`main` is its driver: SHARDS --out OUT --address ADDRESS, under the real lock, ledger, cluster and command line. What a
sample does to its worker stands in its text: "die", "hang"; anything else is harmless.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import typer

import capfilt.data.annotations as tables
from capfilt.cli.execute import execute
from capfilt.cluster.session import connect
from capfilt.cluster.worker_pool import Resources
from capfilt.config import Config
from capfilt.data import shards
from capfilt.data.annotations import Annotation
from capfilt.data.policy import failure_class
from capfilt.data.sample import FailedSample, Sample, skip_positions
from capfilt.runs import quarantine
from capfilt.runs.ledger import Ledger, fingerprint
from capfilt.runs.progress import Progress
from capfilt.runs.run import Run
from capfilt.runs.tally import Tally
from capfilt.stages.bisect import Splittable, version_of
from capfilt.stages.runner import run_stage
from capfilt.storage.paths import StoragePath, storage_path


class Toy(Config):
    """Writes a row for each text of a shard."""

    splittable: ClassVar[bool] = True

    out: StoragePath
    pids: Path
    """Where each worker leaves a file with its process number."""
    pause: float = 0.0
    """Seconds a sample takes."""

    @property
    def name(self) -> str:
        return "toy"

    def identity(self, item: str) -> str:
        return fingerprint(shards.stat(item))

    def open(self) -> Splittable:
        (self.pids / str(os.getpid())).touch()
        return Splittable(self.whole, self.part)

    def whole(self, url: str) -> str:
        name, ledger, identity = shards.name(url), Ledger(self.out, self.name), self.identity(url)
        rows, tally, digest = [], Tally.zero(), shards.Digest()
        for row in self.rows(
            skip_positions(
                shards.read(url, digest), quarantine.read(ledger, name, version_of(identity, shards.stat(url)))
            )
        ):
            rows.append(row)
            tally.samples.update(["in", "failed" if row.status == "failed" else "kept"])
            if row.status == "failed":
                tally.failed[failure_class(row.reason)] += 1
        path = self.out / "annotations" / f"{name}.parquet"
        tables.write(path, rows)
        ledger.commit(name, identity, [path], tally, digest.result())
        return ""

    def part(self, url: str, start: int, stop: int) -> int:
        list(self.rows(islice(shards.read(url), start, stop)))
        return sum(1 for _ in shards.read(url))

    def rows(self, items: Iterable[Sample | FailedSample]) -> Iterable[Annotation]:
        made = {"source": "web", "candidate": 0, "captioner": "", "filter": "", "seed": 0, "round": 0, "itc": None}
        for item in items:
            time.sleep(self.pause)
            if isinstance(item, FailedSample):
                failed = {"uid": "", "sha256": "", "text": "", "itm": None, "status": "failed", "reason": item.reason}
                yield Annotation(key=item.key, **made, **failed)  # type: ignore[arg-type]
                continue
            if item.text == "die":
                os._exit(9)
            if item.text == "hang":
                time.sleep(600)
            read = {"uid": item.uid, "sha256": item.sha256, "text": item.text, "itm": 0.5}
            yield Annotation(key=item.key, **made, **read)  # type: ignore[arg-type]


def drive(words: argparse.Namespace, show: Progress) -> dict[str, Any]:
    """What a verb does: open the run folder, connect, run the stage."""
    urls = shards.expand(words.shards)
    out = words.out.absolute()
    if not words.unlocked:
        Run.open(out, "", {"verb": "toy", "shards": urls}, min_free_bytes=0)
    job = Toy(out=out, pids=words.pids, pause=words.pause)
    resources = Resources(cpus=1, limit=words.limit, workers=words.workers)
    with connect(words.address) as session:
        return run_stage(session, job, shards.by_name(urls), resources, show, "toy").to_json()


def main() -> int:
    """Drive one run; returns the exit code, as the command line would leave with it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("shards")
    for option, kind, default in (
        ("out", storage_path, None), ("pids", Path, None), ("address", str, "local"),
        ("pause", float, 0.0), ("limit", float, 0.0), ("workers", int, 0),
    ):  # fmt: skip
        parser.add_argument(f"--{option}", type=kind, default=default)
    parser.add_argument("--unlocked", action="store_true")
    words = parser.parse_args()
    try:
        execute(lambda show: drive(words, show), as_json=True, debug=False)
    except typer.Exit as end:
        return int(end.exit_code)
    return 0
