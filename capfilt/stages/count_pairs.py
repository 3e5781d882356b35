"""rows: how many rows of a training each shard has and the sha256 of its bytes, for which it is read once (a step of
every training and of whatever reads a set of shards as a whole, not a verb).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from capfilt.cluster.session import Session
from capfilt.cluster.worker_pool import Resources
from capfilt.config import Config
from capfilt.data import shards
from capfilt.data.loading.config import Captions, Source
from capfilt.data.loading.rows import count_pairs
from capfilt.data.shards.members import MemberCounts
from capfilt.runs.ledger import Completion, Ledger, fingerprint
from capfilt.runs.progress import Progress
from capfilt.runs.tally import Tally
from capfilt.stages.runner import run_stage
from capfilt.storage.paths import StoragePath


class RowsJob(Config):
    """Reads shards to their end and counts; the outcome is the tally in the ledger."""

    out: StoragePath
    names: dict[str, str] = {}
    """By its url, the ledger's name of a shard that `entry` alone does not tell from another."""

    @property
    def name(self) -> str:
        """The stage."""
        return "rows"

    def identity(self, item: str) -> str:
        """The shard."""
        return fingerprint(shards.stat(item))

    def open(self) -> Callable[[str], str]:
        """Nothing to load."""

        def work(url: str) -> str:
            digest, members = shards.Digest(shards.stat(url)["version"]), MemberCounts()
            found = count_pairs(url, digest, members)
            came = found.images + found.without_text
            samples = Counter({"in": came, "kept": found.images, "dropped": found.without_text})
            texts = Counter({"all": found.texts})
            tally = Tally(samples=samples, texts={"in": texts, "kept": texts, "dropped": Counter()}, members=members)
            Ledger(self.out, self.name).commit(
                self.names.get(url) or entry(url), self.identity(url), [], tally, digest.result()
            )
            return f"{found.without_text} images without a text" if found.without_text else ""

        return work


def without_text(folder: StoragePath) -> int:
    """How many pictures a run left out of its trainings since they have no text; each shard counts once."""
    return sum(done.tally.samples["dropped"] for done in Ledger(folder, "rows").completions())


def entry(url: str, known: dict[str, Any] | None = None) -> str:
    """The name of a shard in the ledger: two sources may have a shard 00000 each, and a run folder may be moved."""
    return f"{shards.name(url)}-{fingerprint(known or shards.identity(url))[:16]}"


def count_rows(
    session: Session, sources: Sequence[Source], captions: Captions, folder: StoragePath, show: Progress
) -> dict[str, int]:
    """How many rows each shard has, by its url; `folder/ledger/rows` keeps what was counted."""
    found = read_once(session, [url for source in sources for url in shards.expand(source.shards)], folder, show)
    if bare := sum(done.tally.samples["dropped"] for done in found.values()):
        show.say(f"{bare} pictures have no text: they are not trained on")
    kind = {"all": lambda tally: tally.texts["kept"]["all"], "one": lambda tally: tally.samples["kept"]}[captions]
    return {url: kind(done.tally) for url, done in found.items()}


def contents_of(
    session: Session, urls: Iterable[str], made: Mapping[str, str], folder: StoragePath, show: Progress
) -> dict[str, str]:
    """The sha256 of each shard, by its url: those that the run `made` itself are known, others are read once.

    A shard that has the same bytes under another time of writing is the same.
    """
    known = {url: made[url] for url in urls if url in made}
    found = read_once(session, [url for url in urls if url not in made], folder, show)
    return known | {url: done.input.sha256 for url, done in found.items() if done.input is not None}


def read_once(session: Session, urls: Sequence[str], folder: StoragePath, show: Progress) -> dict[str, Completion]:
    """What is known of shards that were read to their end, by their urls; those of which nothing is are read now."""
    # A store is asked once for all of them: 100,000 shards, one after the other, would take hours.
    stats = shards.stats(urls)
    known = shards.identities(stats)
    names = {url: entry(url, known[url]) for url in stats}
    items = {name: url for url, name in names.items()}
    job = RowsJob(out=folder, names={url: name for url, name in names.items() if "url" in known[url]})
    ledger = Ledger(folder, job.name)
    todo = {name: url for name, url in items.items() if ledger.completion(name, fingerprint(stats[url])) is None}
    if todo:
        run_stage(session, job, todo, Resources(), show, "count pairs")
    found = {done.shard: done for done in ledger.completions()}
    return {url: found[name] for url, name in names.items()}
