"""convert: shards for a downstream task from the files in which its data set is published.

The files are read once, in the driver, and planned into shards; a shard is made by one task and committed like those of
every other stage. The run folder is the data set: tars, Parquets with a row for every row that came, and sizes.json lie
at its top, plans in plan/.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from capfilt.cluster.session import Session
from capfilt.cluster.worker_pool import Resources
from capfilt.config import Config, validate
from capfilt.data.sample import Sample
from capfilt.data.shards.sources.entries import read_picture
from capfilt.data.tasks.official import READERS, WITH_SPLITS, plans
from capfilt.data.tasks.official.pictures import PictureFolder
from capfilt.data.tasks.official.samples import NO_ROWS, Converted, convert, reason_class
from capfilt.data.tasks.official.spool import Spool
from capfilt.errors import DataError, ListError, UsageError
from capfilt.printable import printable
from capfilt.runs.ledger import Ledger, fingerprint
from capfilt.runs.progress import Progress
from capfilt.runs.tally import Tally, bounded
from capfilt.stages.outputs import sizes_of, write_shard, write_sizes
from capfilt.stages.runner import check_success, run_stage
from capfilt.storage import documents
from capfilt.storage.atomic import sha256_file, write_json
from capfilt.storage.paths import StoragePath, make_folder, remove_folder, storage_path

STAGE = "convert"
PLAN = "plan"

Task = Literal["vqa", "nlvr2", "entailment", "grounding", "dialog", "retrieval", "captioning"]

_COLUMNS = ("key", "uid", "sha256", "kind", "id", "status", "reason")


class ConvertConfig(Config):
    """What is converted; all of it decides what is written."""

    task: Task
    files: tuple[str, ...] = Field(min_length=1)
    images: str
    """The folder of the pictures."""
    split: tuple[str, ...] = ()
    """Which splits of the files are wanted, where they hold several."""
    shard_size: int = Field(default=1000, ge=1, le=100_000)
    """Pictures of a shard."""


class Plan(Config):
    """What was planned of a data set."""

    shards: int
    samples: int
    rows: int
    other_splits: dict[str, int] = {}
    """How many rows of splits that were not wanted the files have; of captions, how many pictures."""


class ConvertJob(Config):
    """Makes shards in a worker; an item is the name of a shard."""

    unit: ClassVar[str] = "shards"
    name: ClassVar[str] = STAGE
    lists_images: ClassVar[bool] = True

    out: StoragePath
    images: str

    def identity(self, item: str) -> str:
        """The fingerprint of the shard's planned rows and of the folder of pictures."""
        return fingerprint(self.images, sha256_file(self.out / PLAN / f"{item}.parquet"))

    def open(self) -> Callable[[str], None]:
        """Nothing to load."""
        return self.shard

    def shard(self, name: str) -> None:
        """Read the pictures of one shard, write its files, and commit it."""
        rows: list[dict[str, str | None]] = []
        tally = Tally.zero()
        tar, table = self.out / f"{name}.tar", self.out / f"{name}.parquet"
        planned = list(plans.read(self.out / PLAN, name))
        read = partial(read_picture, self.images)

        def kept() -> Iterator[Sample]:
            width = len(str(len(planned) - 1))
            for number, one in enumerate(planned):
                key = f"{name}{number:0{max(4, width)}d}"
                converted = convert(key, one, read)
                _count(tally, key, converted, rows)
                if converted.sample is not None:
                    yield converted.sample

        outputs = write_shard(tar, table, kept(), rows, _COLUMNS)
        Ledger(self.out, STAGE).commit(name, self.identity(name), outputs, tally)


def _count(tally: Tally, key: str, converted: Converted, rows: list[dict[str, str | None]]) -> None:
    """Add a sample and its rows to the counts and to the table of the shard."""
    meta = {} if converted.sample is None else converted.sample.meta
    if converted.sample is None:
        tally.add_failed(reason_class(converted.problem))
    else:
        tally.samples.update(["in", "kept"])
    for row in converted.rows:
        # A row that could be used and lies in no sample has gone with it.
        reason = row.problem or ("" if meta else converted.problem or NO_ROWS)
        tally.add_text(row.kind, reason_class(reason))
        names = {"key": key, "uid": meta.get("uid"), "sha256": meta.get("sha256"), "kind": row.kind}
        status = "failed" if reason else "kept"
        rows.append({**names, "id": printable(row.id), "status": status, "reason": printable(reason)})


def make_plan(config: ConvertConfig, out: StoragePath, show: Progress) -> Plan:
    """Read the files and write what each shard will have, unless that is done; in this process.

    Raises:
        UsageError: files of several splits of which none is chosen, or a split that they do not have.
        DataError: a file that is no file of the task, or cannot be read; a folder without pictures.
    """
    done = out / PLAN / "plan.json"
    if done.is_file():
        return validate(Plan, documents.read_json(done), done)
    remove_folder(out / PLAN)
    make_folder(out / PLAN)
    with show.stage("plan", 1) as line, tempfile.TemporaryDirectory(prefix="capfilt-convert-") as folder:
        pictures = PictureFolder(config.images)
        spool = Spool(Path(folder) / "rows.sqlite")
        rows = spool.fill(READERS[config.task](config.files, config.split))
        _check_splits(config, rows, spool.other_splits)
        count, samples = plans.write(out / PLAN, spool.groups(), pictures, config.shard_size)
        line.update(1, f"{rows:,} rows about {samples:,} pictures in {count:,} shard{'s' * (count != 1)}")
    other_splits = bounded(spool.other_splits)
    plan = Plan(shards=count, samples=samples, rows=rows, other_splits=dict(sorted(other_splits.items())))
    write_json(done, plan.model_dump(mode="json"))
    return plan


def check_config(config: ConvertConfig) -> None:
    """Refuse splits where the files of a task have none, and pictures in no folder. UsageError."""
    if config.split and config.task not in WITH_SPLITS:
        raise UsageError(
            f"--split {','.join(config.split)}: each file of {config.task} is of one split; give the files of those"
            f" that you want. Splits are chosen for {', '.join(WITH_SPLITS)}."
        )
    if not storage_path(config.images).is_dir():
        raise ListError(f"there is no folder {config.images}: check --images.")


def _check_splits(config: ConvertConfig, rows: int, others: Counter[str]) -> None:
    if rows:
        return
    if not others:
        raise DataError(f"{', '.join(config.files)}: there is no row of {config.task} in it.")
    there = ", ".join(f"{printable(split)} ({count:,})" for split, count in sorted(others.items()))
    given = f"no row is of split {', '.join(config.split)}" if config.split else "it has several splits"
    raise UsageError(f"{config.files[0]}: {given}; choose with --split, as in --split train,val. There are: {there}.")


def convert_shards(
    session: Session, config: ConvertConfig, plan: Plan, out: StoragePath, resources: Resources, show: Progress
) -> dict[str, Any]:
    """Make every planned shard that is not committed yet; returns the summary."""
    items = {name: name for name in map(plans.name_of, range(plan.shards))}
    tally = run_stage(session, ConvertJob(out=out.absolute(), images=config.images), items, resources, show, STAGE)
    write_sizes(out, sizes_of(Ledger(out, STAGE)))
    return summary_of(config, plan, out, tally)


def summary_of(config: ConvertConfig, plan: Plan, out: StoragePath, tally: Tally) -> dict[str, Any]:
    """What became of every picture and every row; `in = kept + failed` of both."""
    failed: dict[str, Counter[str]] = {}
    for reason, count in tally.texts["dropped"].items():
        kind, _, why = reason.partition(": ")
        failed.setdefault(kind, Counter())[why] += count
    rows = {
        kind: {
            "in": count,
            "kept": tally.texts["kept"][kind],
            "failed": failed.get(kind, Counter()).total(),
            "why": dict(failed.get(kind, Counter()).most_common()),
        }
        for kind, count in sorted(tally.texts["in"].items())
    }
    return {
        "command": STAGE,
        "task": config.task,
        "shards": str(out),
        "samples": {name: tally.samples[name] for name in ("in", "kept", "failed")},
        "failed": dict(tally.failed.most_common()),
        "rows": rows,
        "other_splits": plan.other_splits,
    }


def check_converted(tally_summary: dict[str, Any], least: float) -> None:
    """Raise ShortfallError, with the commonest reason, if no picture could be used, or a smaller share than `least`."""
    tally = Tally.zero()
    tally.samples.update(tally_summary["samples"])
    tally.failed.update(tally_summary["failed"])
    check_success(STAGE, tally, least, tally_summary)
