"""rows: how many rows of a training each shard has, counted once (a step of every training, not a verb)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

from capfilt.cluster.session import Session
from capfilt.cluster.spread import Resources
from capfilt.config import Config
from capfilt.data import shards
from capfilt.data.loader import Source, count
from capfilt.pipelines.stage import run_stage
from capfilt.reports.ledger import Ledger, fingerprint
from capfilt.reports.places import Place
from capfilt.reports.progress import Progress
from capfilt.reports.tally import Tally


class RowsJob(Config):
    """Reads shards to their end and counts; the outcome is the tally in the ledger."""

    out: Place

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
            found = count(url)
            came = found.images + found.without_text
            samples = Counter({"in": came, "kept": found.images, "dropped": found.without_text})
            texts = Counter({"all": found.texts})
            tally = Tally(samples=samples, texts={"in": texts, "kept": texts, "dropped": Counter()})
            Ledger(self.out, self.name).commit(entry(url), self.identity(url), [], tally)
            return f"{found.without_text} images without a text" if found.without_text else ""

        return work


def without_text(folder: Place) -> int:
    """How many pictures a run left out of its trainings since they have no text; each shard counts once."""
    return sum(done.tally.samples["dropped"] for done in Ledger(folder, "rows").completions())


def entry(url: str, stat: dict[str, Any] | None = None) -> str:
    """The name of a shard in the ledger: two sources may have a shard 00000 each, and a run folder may be moved."""
    return f"{shards.name(url)}-{fingerprint(shards.known(url, stat))[:16]}"


def count_rows(
    session: Session, sources: Sequence[Source], captions: Literal["all", "one"], folder: Place, show: Progress
) -> dict[str, int]:
    """How many rows each shard has, by its url; `folder/ledger/rows` keeps what was counted."""
    # A store is asked once for all of them: 100,000 shards, one after the other, would take hours.
    stats = shards.stats([url for source in sources for url in shards.expand(source.shards)])
    names = {url: entry(url, stat) for url, stat in stats.items()}
    urls = {name: url for url, name in names.items()}
    job = RowsJob(out=folder)
    ledger = Ledger(folder, job.name)
    todo = {name: url for name, url in urls.items() if ledger.completion(name, fingerprint(stats[url])) is None}
    if todo:
        run_stage(session, job, todo, Resources(), show, "count pairs")
        if bare := sum(done.tally.samples["dropped"] for done in ledger.completions() if done.shard in todo):
            show.say(f"{bare} pictures have no text: they are not trained on")
    tallies = {done.shard: done.tally for done in ledger.completions()}
    kind = {"all": lambda tally: tally.texts["kept"]["all"], "one": lambda tally: tally.samples["kept"]}[captions]
    return {url: kind(tallies[name]) for url, name in names.items()}
