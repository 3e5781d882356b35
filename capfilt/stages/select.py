"""select: apply a policy to annotations and write a cleaned dataset; no model is run.

One shard and its annotations in; one cleaned tar (with the original image bytes) and one Parquet of verdicts out. The
Parquet has a row for every text that came in, so it also records what was dropped, and why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, ClassVar

import pyarrow as pa

import capfilt.data.annotations as tables
from capfilt.cluster.session import Session
from capfilt.cluster.worker_pool import Resources
from capfilt.config import Config, added
from capfilt.data import duplicates, scores, shards
from capfilt.data.annotations import Annotation
from capfilt.data.duplicates import Copies, is_copy, reason_class
from capfilt.data.policy import FUSED, Rule, best_text, failure_class, verdicts_of_image, with_scores
from capfilt.data.sample import Sample
from capfilt.data.shards.members import CARRIED, MemberCounts
from capfilt.errors import DataError, ShortfallError
from capfilt.runs.ledger import Ledger, check_balance, fingerprint
from capfilt.runs.progress import Progress
from capfilt.runs.tally import Tally
from capfilt.stages.outputs import remove_tar, sizes_of, write_sizes, write_table
from capfilt.stages.runner import check_success, run_stage
from capfilt.storage.atomic import sha256_file
from capfilt.storage.paths import StoragePath, make_folder, relative_to

VERDICTS = (pa.field("verdict", pa.string()), pa.field("why", pa.string()))
"""The columns after the annotations' and those of the further scores that the policy used: the verdict (kept |
dropped | failed) and its reason."""

Outcomes = dict[tuple[str, str], list[tuple[Annotation, str]]]
"""Rows, each with the reason why it is dropped ("" = kept), by (key, status): if a shard has a key twice, the first may
be a sample and the second a failure."""


class SelectJob(Config):
    """The job that selects from shards."""

    name: ClassVar[str] = "select"
    by_content: ClassVar[bool] = True

    out: StoragePath
    """The folder of `annotations/`, `dataset/` and `ledger/`."""
    annotations: StoragePath
    rule: Rule
    carry: bool = True
    """Whether kept samples keep the other files under their key."""
    names: dict[str, str] = {}
    """By URL, the names of shards that differ from their file's name (`shards.renamed`)."""
    without: StoragePath | None = added(None)
    """The run folder of a deduplication, whose copies go."""

    def identity(self, item: str) -> str:
        """The policy, the shard's name, and the sha256 of its annotations."""
        name = self._shard_name(item)
        settings = {**self.rule.record(), "carry": self.carry}
        further = [each for each in self.rule.further_scores if each != FUSED]
        contents = [score_sha256(self.annotations.parent, score, name) for score in further]
        contents += [] if self.without is None else [duplicates.content(self.without, name)]
        return fingerprint(settings, shards.name(item), annotations_sha256(self.annotations, name), *contents)

    def open(self) -> Callable[[str], None]:
        """Nothing to load."""
        return self.shard

    def shard(self, url: str) -> None:
        """Decide on the texts of one shard, write what is kept, and commit it."""
        name = self._shard_name(url)
        table = with_scores(tables.read(self.annotations / f"{name}.parquet"), self.annotations, name, self.rule)
        rows = list(tables.rows(table))
        whys = self._without_copies(name, rows, verdicts(rows, self.rule))
        outcomes = _by_outcome(rows, whys)
        folder = self.out / "dataset"
        make_folder(folder)
        tar, table_path = folder / f"{name}.tar", folder / f"{name}.parquet"
        digest, members = shards.Digest(shards.stat(url)["version"]), MemberCounts()
        kept, tally = self._kept(url, outcomes, digest, members), _tally(outcomes)
        if tally.samples["kept"]:
            shards.write(tar, kept)
        else:  # other loaders fail on an empty tar
            written = sum(1 for _ in kept)
            assert not written, "the tally says that nothing is kept"
            remove_tar(tar)
        write_table(table_path, _verdicts(table, rows, whys))
        if not self.carry:
            members["not carried"] += members.pop(CARRIED, 0)
        tally.members.update(members)
        outputs = [tar, table_path] if tally.samples["kept"] else [table_path]
        Ledger(self.out, self.name).commit(name, self.identity(url), outputs, tally, digest.result())

    def _shard_name(self, url: str) -> str:
        return self.names.get(url) or shards.name(url)

    def _without_copies(self, name: str, rows: Sequence[Annotation], whys: list[str]) -> list[str]:
        """The reasons, in which every text of a copy goes. DataError for copies that the shard does not have."""
        if self.without is None:
            return whys
        copies = Copies.load(self.without, name)
        copies.check((row.key, row.uid) for row in rows)
        return [copies.reason(row.key, row.uid) or why for row, why in zip(rows, whys, strict=True)]

    def _kept(self, url: str, outcomes: Outcomes, digest: shards.Digest, members: MemberCounts) -> Iterator[Sample]:
        """The samples with at least one kept text, in the shard's order, their captions replaced by the kept ones."""
        for item in shards.read(url, digest, members, extras=self.carry):
            if not isinstance(item, Sample):
                continue
            texts = outcomes.get((item.key, "ok"))
            if texts is None:
                if (item.key, "failed") in outcomes:  # its picture could not be decoded
                    continue
                raise DataError(f"{url}: key {item.key} has no annotation; annotate this shard again")
            kept = [row for row, why in texts if not why]
            if not kept:
                continue
            captions = [caption_of(row) for row in kept]
            meta = {**item.meta, "uid": item.uid, "sha256": item.sha256, "captions": captions}
            yield replace(item, text=best_text(kept, self.rule).text, meta=meta)


def caption_of(row: Annotation) -> dict[str, Any]:
    """A kept text as it stands in the json of its sample."""
    return {
        "text": row.text,
        "source": row.source,
        "itm": row.itm,
        "itc": row.itc,
        **row.scores,
        "round": row.round,
    }


def verdicts(rows: Sequence[Annotation], rule: Rule) -> list[str]:
    """The reason why each row is dropped, "" where it is kept. Rows of one image must be adjacent; they are decided
    together."""
    images = groupby(rows, key=lambda row: (row.key, row.status))
    whys = [why for _, image in images for why in verdicts_of_image(list(image), rule)]
    return [row.reason if is_copy(row.reason) else why for row, why in zip(rows, whys, strict=True)]


def annotations_sha256(folder: StoragePath, name: str) -> str:
    """The sha256 of a shard's annotations: from the ledger if it has them, so that a plan need not read every file."""
    return _sha256(Ledger(folder.parent, "annotate"), name, folder / f"{name}.parquet")


def score_sha256(folder: StoragePath, score: str, name: str) -> str:
    """The sha256 of the table of one of a run folder's further scores, as `annotations_sha256`. DataError without."""
    path = scores.path_of(folder, score, name)
    if not path.is_file():
        raise scores.missing(folder, score, name)
    return _sha256(Ledger(folder, f"score-{score}"), name, path)


def _sha256(ledger: Ledger, name: str, path: StoragePath) -> str:
    done = ledger.read(ledger.path / f"{name}.json")
    committed = {out.path: out.sha256 for out in done.outputs} if done and not ledger.find_damage(done) else {}
    return committed.get(str(relative_to(path, ledger.folder))) or sha256_file(path)


def _by_outcome(rows: Sequence[Annotation], whys: Sequence[str]) -> Outcomes:
    outcomes: Outcomes = {}
    for row, why in zip(rows, whys, strict=True):
        outcomes.setdefault((row.key, row.status), []).append((row, why))
    return outcomes


def _verdicts(table: pa.Table, rows: Sequence[Annotation], whys: Sequence[str]) -> pa.Table:
    column = [
        "failed" if row.status == "failed" else "dropped" if why else "kept"
        for row, why in zip(rows, whys, strict=True)
    ]
    for field, values in zip(VERDICTS, (column, list(whys)), strict=True):
        table = table.append_column(field, pa.array(values, pa.string()))
    return table


def read_verdicts(path: StoragePath) -> pa.Table:
    """A table that `select` wrote. DataError for another one, and as `annotations.read`."""
    schema = tables.SCHEMA
    for column in VERDICTS:
        schema = schema.append(column)
    return tables.read(path, schema)


def _tally(outcomes: Outcomes) -> Tally:
    tally = Tally.zero()
    for (_, status), texts in outcomes.items():
        # A failed row is a sample; the other rows of a key are the texts of one sample.
        if status == "failed":
            tally.failed.update(failure_class(row.reason) for row, _ in texts)
            tally.samples.update({"in": len(texts), "failed": len(texts)})
            continue
        tally.samples.update(["in", "dropped" if all(why for _, why in texts) else "kept"])
        for row, why in texts:
            tally.add_text(row.source, reason_class(why))
    return tally


def select(
    session: Session,
    named: Mapping[str, str],
    job: SelectJob,
    resources: Resources,
    show: Progress,
    label: str = "select",
) -> Tally:
    """Write the cleaned shards, given as name -> URL; returns the counts of kept, dropped and failed."""
    job = job.model_copy(update={"names": shards.renamed(named)})
    total = run_stage(session, job, named, resources, show, label)
    check_balance(Ledger(job.annotations.parent, "annotate"), Ledger(job.out, job.name), named)
    write_sizes(job.out / "dataset", sizes_of(Ledger(job.out, job.name), named))
    return total


def check_selected(
    label: str, tally: Tally, rule: Rule, least: float = 0, result: dict[str, Any] | None = None
) -> None:
    """Raise ShortfallError if a policy kept nothing, or if too few samples could be read at all."""
    check_success(label, tally, least, result)
    if not tally.samples["kept"]:
        raise ShortfallError(
            f"{label}: the policy kept none of {sum(tally.num_scored().values())} texts at {rule};"
            " ask for less, in another --out.",
            result,
        )
