"""rows: the number of training rows of each shard, and the sha256 of its bytes.

A shard is read once for both, by every training and by whatever needs a set of shards as a whole; it is no verb.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from capfilt.cluster.session import Session
from capfilt.cluster.worker_pool import Resources
from capfilt.config import Config
from capfilt.data import shards
from capfilt.data.loading.config import Captions, RowKind, Source
from capfilt.data.loading.rows import count_pairs
from capfilt.data.loading.task_texts import count_answers
from capfilt.data.shards.members import MemberCounts
from capfilt.errors import DataError
from capfilt.models import Architecture
from capfilt.objectives.kinds import TaskConfig
from capfilt.runs.ledger import Completion, Ledger, fingerprint
from capfilt.runs.progress import Progress
from capfilt.runs.tally import Tally
from capfilt.stages.runner import run_stage
from capfilt.storage.paths import StoragePath

REGIONS = "with regions"
"""The source under which a tally has the pictures that have regions; left out where there are none."""


class RowsJob(Config):
    """Reads shards to their end and counts their pairs; the outcome is the tally in the ledger."""

    unit: ClassVar[str] = "shards"
    only_reads: ClassVar[bool] = True

    out: StoragePath
    names: dict[str, str] = {}
    """By url, the ledger's name of a shard that `ledger_name` alone would give to another too."""

    @property
    def name(self) -> str:
        """The stage."""
        return "rows"

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
) -> dict[str, int]:
    """The number of rows of a kind of each shard, by its url; `folder/ledger/rows` keeps the counts.

    Raises:
        DataError: there are no rows of a downstream task's kind.
    """
    urls = [url for source in sources for url in shards.expand(source.shards)]
    completions = _completions(session, urls, folder, show)
    if kind != "captions":
        rows = {url: done.tally.texts["kept"][kind] for url, done in completions.items()}
        if not any(rows.values()):
            raise DataError(_no_rows(urls, kind))
        return rows
    if num_bare := sum(done.tally.samples["dropped"] for done in completions.values()):
        show.say(f"{num_bare} pictures have no text: they are not trained on")
    tallies = {url: done.tally for url, done in completions.items()}
    if captions == "all":
        return {url: tally.texts["kept"]["all"] for url, tally in tallies.items()}
    return {url: tally.samples["kept"] for url, tally in tallies.items()}


def _no_rows(urls: Sequence[str], kind: str) -> str:
    where = urls[0] if len(urls) == 1 else f"{len(urls)} shards, the first of which is {urls[0]}"
    return (
        f"no picture of {where} has {kind} with an answer; docs/tasks.md says what a sample's json has for each task."
    )


def count_regions(session: Session, sources: Sequence[Source], folder: StoragePath, show: Progress) -> dict[str, int]:
    """The number of pictures with regions of each shard, by its url, of what `count_rows` counted."""
    urls = [url for source in sources for url in shards.expand(source.shards)]
    return {url: done.tally.texts["kept"][REGIONS] for url, done in _completions(session, urls, folder, show).items()}


def shard_digests(
    session: Session, urls: Iterable[str], made: Mapping[str, str], folder: StoragePath, show: Progress
) -> dict[str, str]:
    """The sha256 of each shard, by its url: a shard of the same bytes and another time of writing is the same.

    `made`: the sha256 of those that the run wrote itself; the others are read, each once.
    """
    known = {url: made[url] for url in urls if url in made}
    completions = _completions(session, [url for url in urls if url not in made], folder, show)
    return known | {url: done.input.sha256 for url, done in completions.items() if done.input is not None}


def shard_tallies(session: Session, urls: Sequence[str], folder: StoragePath, show: Progress) -> dict[str, Tally]:
    """What each shard holds, by its url; `folder/ledger/rows` keeps it."""
    return {url: done.tally for url, done in _completions(session, urls, folder, show).items()}


def _completions(session: Session, urls: Sequence[str], folder: StoragePath, show: Progress) -> dict[str, Completion]:
    """The ledger's records of shards, by their urls; those that have none are read now."""
    # All are looked up at the same time: 100,000 shards of a store, one after the other, would take hours.
    stats = shards.stats(urls)
    identities = shards.identities(stats)
    names = {url: ledger_name(url, identities[url]) for url in stats}
    items = {name: url for url, name in names.items()}
    job = RowsJob(out=folder, names={url: name for url, name in names.items() if "url" in identities[url]})
    ledger = Ledger(folder, job.name)
    todo = {name: url for name, url in items.items() if ledger.completion(name, fingerprint(stats[url])) is None}
    if todo:
        run_stage(session, job, todo, Resources(), show, "count pairs")
    by_name = {done.shard: done for done in ledger.completions()}
    return {url: by_name[name] for url, name in names.items()}


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
