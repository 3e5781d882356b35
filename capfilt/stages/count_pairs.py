"""rows: the number of training rows of each shard, and the sha256 of its bytes.

A shard is read once for both, by every training and by whatever needs a set of shards as a whole; it is no verb. Of
many shards that `select` wrote nothing is read: its ledger has both.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar, NamedTuple

from capfilt.cluster.session import Session
from capfilt.cluster.worker_pool import Resources
from capfilt.config import Config
from capfilt.data import shards
from capfilt.data.loading.config import Captions, RowKind, Source
from capfilt.data.loading.rows import count_pairs
from capfilt.data.loading.task_texts import count_answers
from capfilt.data.shards.members import MemberCounts
from capfilt.data.shards.urls import is_tar
from capfilt.errors import DataError, RunError
from capfilt.models import Architecture
from capfilt.objectives.kinds import TaskConfig
from capfilt.runs.ledger import Completion, Ledger, fingerprint
from capfilt.runs.progress import Progress
from capfilt.runs.tally import Tally
from capfilt.stages.runner import run_stage
from capfilt.storage.paths import StoragePath, storage_path
from capfilt.storage.remote_path import RemotePath, Stat

REGIONS = "with regions"
"""The source under which a tally has the pictures that have regions; left out where there are none."""
_MAKERS = ("download", "convert")
"""The stages that write shards into their run folder itself; `select` writes into `dataset/`."""


class RowsJob(Config):
    """Reads shards to their end and counts their pairs; the outcome is the tally in the ledger."""

    name: ClassVar[str] = "rows"
    unit: ClassVar[str] = "shards"
    only_reads: ClassVar[bool] = True

    out: StoragePath
    names: dict[str, str] = {}
    """By url, the ledger's name of a shard that `ledger_name` alone would give to another too."""

    def identity(self, item: str) -> str:
        """The fingerprint of what the storage says of the shard."""
        return fingerprint(shards.stat(item))

    def open(self) -> Callable[[str], None]:
        """Nothing to load."""

        def work(url: str) -> None:
            digest, members = shards.Digest(shards.stat(url)["version"]), MemberCounts()
            count = count_pairs(url, digest, members)
            num_images = count.images + count.without_text
            samples = Counter({"in": num_images, "kept": count.images, "dropped": count.without_text})
            texts = Counter({"all": count.texts, **count.of_tasks})
            if count.with_regions:
                texts[REGIONS] = count.with_regions
            tally = Tally(samples=samples, texts={"in": texts, "kept": texts, "dropped": Counter()}, members=members)
            Ledger(self.out, self.name).commit(
                self.names.get(url) or ledger_name(url), self.identity(url), [], tally, digest.result()
            )

        return work


def num_without_text(folder: StoragePath) -> int:
    """How many pictures a run left out of its trainings because they have no text; each shard counts once."""
    return sum(done.tally.samples["dropped"] for done in Ledger(folder, "rows").completions())


def ledger_name(url: str, identity: dict[str, Any] | None = None) -> str:
    """The name of a shard in the ledger: two sources may have a shard 00000 each, and a run folder may be moved."""
    return f"{shards.name(url)}-{fingerprint(identity or shards.identity(url))[:16]}"


def count_rows(
    session: Session,
    sources: Sequence[Source],
    captions: Captions,
    folder: StoragePath,
    show: Progress,
    kind: RowKind = "captions",
    written: Mapping[str, WrittenShard] | None = None,
) -> dict[str, int]:
    """The number of rows of a kind of each shard, by its url; `folder/ledger/rows` keeps the counts.

    `written`: what ledgers say of shards that a run wrote, which are not read where that is enough.

    Raises:
        DataError: there are no rows of a downstream task's kind.
    """
    urls = [url for source in sources for url in shards.expand(source.shards)]
    if kind != "captions":
        rows = {url: count.texts[kind] for url, count in _counts(session, urls, folder, show).items()}
        if not any(rows.values()):
            raise DataError(_no_rows(urls, kind))
        return rows
    known = {url: one for url, one in (written or {}).items() if one.images is not None and one.texts is not None}
    counts = _counts(session, [url for url in urls if url not in known], folder, show)
    if num_bare := sum(count.without_text for count in counts.values()):
        show.say(f"{num_bare} pictures have no text: they are not trained on")
    if captions == "all":
        return {url: known[url].texts or 0 if url in known else counts[url].texts["all"] for url in urls}
    return {url: known[url].images or 0 if url in known else counts[url].images for url in urls}


def _no_rows(urls: Sequence[str], kind: str) -> str:
    where = urls[0] if len(urls) == 1 else f"{len(urls)} shards, the first of which is {urls[0]}"
    return (
        f"no picture of {where} has {kind} with an answer; docs/tasks.md says what a sample's json has for each task."
    )


def count_regions(session: Session, sources: Sequence[Source], folder: StoragePath, show: Progress) -> dict[str, int]:
    """The number of pictures with regions of each shard, by its url, of what `count_rows` counted."""
    urls = [url for source in sources for url in shards.expand(source.shards)]
    return {url: count.texts[REGIONS] for url, count in _counts(session, urls, folder, show).items()}


def shard_digests(
    session: Session, urls: Iterable[str], made: Mapping[str, str], folder: StoragePath, show: Progress
) -> dict[str, str]:
    """The sha256 of each shard, by its url: a shard of the same bytes and another time of writing is the same.

    `made`: the sha256 of those that the run wrote itself; the others are read, each once.
    """
    known = {url: made[url] for url in urls if url in made}
    counts = _counts(session, [url for url in urls if url not in made], folder, show)
    return known | {url: count.sha256 for url, count in counts.items() if count.sha256}


def count_images(session: Session, urls: Sequence[str], folder: StoragePath, show: Progress) -> dict[str, int]:
    """The number of pictures of each shard, with a text or without, by its url; `folder/ledger/rows` keeps it."""
    counts = _counts(session, urls, folder, show)
    return {url: count.images + count.without_text for url, count in counts.items()}


class _ShardCount(NamedTuple):
    """What a reading of a shard found: a tenth of the memory of its completion."""

    sha256: str
    images: int
    without_text: int
    texts: Counter[str]

    @classmethod
    def of(cls, done: Completion) -> _ShardCount:
        samples, texts = done.tally.samples, done.tally.texts["kept"]
        return cls(done.input.sha256 if done.input else "", samples["kept"], samples["dropped"], texts)


def _counts(session: Session, urls: Sequence[str], folder: StoragePath, show: Progress) -> dict[str, _ShardCount]:
    """The ledger's counts of shards, by their urls; those that it does not have are read now."""
    if not urls:
        return {}
    # All are looked up at the same time: 100,000 shards of a store, one after the other, would take hours.
    stats = shards.stats(urls)
    identities = shards.identities(stats)
    names = {url: ledger_name(url, identities[url]) for url in stats}
    items = {name: url for url, name in names.items()}
    job = RowsJob(out=folder, names={url: name for url, name in names.items() if "url" in identities[url]})
    wanted = {name: fingerprint(stats[url]) for name, url in items.items()}
    found = _recorded(Ledger(folder, job.name), wanted)
    if todo := {name: url for name, url in items.items() if name not in found}:
        run_stage(session, job, todo, Resources(), show, "count pairs")
        found |= _recorded(Ledger(folder, job.name), {name: wanted[name] for name in todo})
    return {url: found[name] for url, name in names.items()}


def _recorded(ledger: Ledger, wanted: Mapping[str, str]) -> dict[str, _ShardCount]:
    """The counts of those shards, name -> fingerprint, whose completion has that fingerprint."""
    done = (one for one in ledger.readable_completions() if wanted.get(one.shard) == one.fingerprint)
    return {one.shard: _ShardCount.of(one) for one in done}


def with_known_answers(architecture: Architecture, objectives: TaskConfig, urls: Sequence[str]) -> Architecture:
    """An architecture with the answers that its model chooses among, where a training asks for them and the recipe
    names none: those that its rows give often enough; every shard is read.

    Raises:
        DataError: there are no questions with answers, or fewer than two answers are given so often.
    """
    least = objectives.least_answers
    if least is None or architecture.known_answers != ():
        return architecture
    answers = count_answers(urls, least)
    if len(answers) < 2:
        if not count_answers(urls, 1):
            raise DataError(_no_rows(urls, "questions"))
        raise DataError(
            f"{len(answers) or 'no'} answer is the most frequent one of {least} questions or more, and a model chooses "
            "among two at least: lower train.objectives.min_answers, or name them in model.labels or model.answer_list."
        )
    return architecture.with_answers(answers)


# ---- what ledgers say ----


class WrittenShard(NamedTuple):
    """What a ledger says of one shard."""

    sha256: str
    images: int | None
    """Images that have a text, and their texts; None where the maker does not count what a training counts: a download
    knows how many captions came, and not which of them have something to read."""
    texts: int | None


def written_shards(urls: Iterable[str]) -> dict[str, WrittenShard]:
    """What the ledgers beside these shards say of them, by URL; nothing of shards that no run wrote, or that changed.

    A record counts only for the file that it was made of: of the recorded size, and not written after the record. Each
    completion is read once, whatever the size of the shards.
    """
    by_folder: dict[str, dict[str, str]] = {}
    for url in urls:
        folder, _, name = url.rpartition("/")
        if folder and not url.startswith(("http://", "https://")) and is_tar(url):
            by_folder.setdefault(folder, {})[name] = url
    return {
        of_folder[name]: found
        for folder, of_folder in by_folder.items()
        for name, found in _of_folder(storage_path(folder), of_folder)
    }


def _of_folder(folder: StoragePath, wanted: Mapping[str, str]) -> Iterator[tuple[str, WrittenShard]]:
    """By file name, what the ledger of the run that wrote a folder says of the wanted tars there."""
    in_dataset = folder.name == "dataset"
    prefix = "dataset/" if in_dataset else ""
    for ledger in [Ledger(folder.parent, "select")] if in_dataset else [Ledger(folder, stage) for stage in _MAKERS]:
        file_of, record_of = _stats(folder), _stats(ledger.path)
        try:
            for done in ledger.readable_completions():
                for output in done.outputs:
                    name = output.path.removeprefix(prefix)
                    file = file_of(name) if name in wanted else None
                    if file is None or file.st_size != output.bytes:
                        continue
                    record = record_of(f"{done.shard}.json")
                    if record is not None and 0 < file.st_mtime <= record.st_mtime:
                        yield name, _written(output.sha256, done.tally if in_dataset else None)
        except RunError:  # its folder is reached by a link, say: then the shards themselves are read
            return


def _stats(folder: StoragePath) -> Callable[[str], os.stat_result | Stat | None]:
    """What gives size and time of the files of a folder, by name, None for none: one listing of a store. The files of
    a disk are asked for as they come: a million answers at once would take a gigabyte."""
    if isinstance(folder, RemotePath):
        return folder.listing().get

    def stat(name: str) -> os.stat_result | None:
        with suppress(FileNotFoundError):
            return os.lstat(f"{folder}/{name}")
        return None

    return stat


def _written(sha256: str, selected: Tally | None) -> WrittenShard:
    if selected is None:
        return WrittenShard(sha256, None, None)
    return WrittenShard(sha256, selected.samples["kept"], selected.texts["kept"].total())
