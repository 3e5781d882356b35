"""The verb `decontaminate` as a function, and what it returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from capfilt.api import arguments
from capfilt.api.arguments import Location, Specs, location, named, names_of
from capfilt.api.progress import OnLog, OnProgress, progress_of
from capfilt.api.results import Record

if TYPE_CHECKING:
    from capfilt.runs.progress import Progress
    from capfilt.storage.paths import StoragePath

BY = "sha256,phash:6,text:6"
"""What makes a suspect where nothing is said."""


@dataclass(frozen=True)
class DecontaminateResult:
    """What of held-out sets is in a pool."""

    contaminated: StoragePath
    """A table with a row for each contaminated sample, held-out set and kind; `select(without=...)` takes its
    folder."""
    verdict: str
    """contaminated | clean | unknown: nothing was found by a descriptor that fails the self-test."""
    samples: Mapping[str, int]
    """The pool's: in, kept, dropped, failed."""
    sets: Mapping[str, Record]
    """By held-out set: its pictures, how many of them are in the pool, and by kind the pool's samples that are near."""
    self_test: Mapping[str, Record]
    """By kind of nearness: the recall of each kind of copy, and the share of pictures taken for another one."""
    record: Record = field(repr=False)

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows of the table, in the order of the shards' names."""
        from capfilt.stages.near.decontaminate.rows import read

        return read(self.contaminated)


def decontaminate(
    embeddings: Location,
    *,
    against: Specs,
    out: Location,
    by: str = BY,
    shards: Specs = (),
    model: Location | None = None,
    self_test: int = 200,
    seed: int = 0,
    fail: bool = False,
    address: str | None = None,
    workers: int = 0,
    cpus: float | None = None,
    gpus: float | None = None,
    on_progress: OnProgress | Progress | None = None,
    on_log: OnLog | None = None,
) -> DecontaminateResult:
    """Find the samples of a pool that are copies of held-out pictures, or have a held-out text.

    Args:
        embeddings: the run folder of the pool's embeddings, the `out` of `embed`.
        against: held-out sets, each shards or a folder of pictures, as SPEC or NAME=SPEC.
        out: the run folder, or its URL.
        by: what makes a suspect: sha256, phash:BITS, text[:WORDS] (equal text of so many words or more), and of
            embeddings with vectors vector:COSINE, or copy:, clip: or itc: where they must be of that kind.
        shards: where the pool's shards lie, for its texts; by default where they were embedded.
        model: where vectors are compared, the model that embedded the pool, named as for `embed`.
        self_test: held-out pictures of which copies are made, to see which of them would be found; drawn by `seed`.
        fail: raise ShortfallError, with the result in `.result`, unless the pool is clean.
        address: as in `select`; so are `workers`, `cpus`, `gpus`, `on_progress` and `on_log`.

    Raises:
        CapfiltError: UsageError for sets or nearness that cannot be compared, and its other kin.
    """
    show = progress_of(on_progress, on_log)
    with show.wait("importing libraries"):
        from capfilt import config as configs
        from capfilt.pipelines.near import decontaminate as pipeline
        from capfilt.stages.near.decontaminate.compare import Settings
        from capfilt.stages.near.decontaminate.criteria import Criteria

    given = {"criteria": Criteria.parse(by), "self_test": self_test, "seed": seed}
    settings = configs.validate(Settings, given, "arguments")
    where_shards = names_of(shards) if shards else ()
    sources = pipeline.Sources(location(embeddings), names_of(against), where_shards, named(model))
    with arguments.working(show, out, address, {"workers": workers, "cpus": cpus, "gpus": gpus}) as place:
        record = pipeline.run(place, sources, settings, fail)
    found = record["verdict"], record["samples"], record["sets"], record["self_test"]
    return DecontaminateResult(place.out / "contaminated.parquet", *found, record)
