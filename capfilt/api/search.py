"""The verbs that search a pool of pictures, as functions, and what they return."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from capfilt.api import arguments
from capfilt.api.arguments import Location, located, location, named
from capfilt.api.progress import OnLog, OnProgress, progress_of
from capfilt.api.results import Record

if TYPE_CHECKING:
    from capfilt.runs.progress import Progress
    from capfilt.storage.paths import StoragePath


@dataclass(frozen=True)
class IndexResult:
    """An index of pictures by their vectors."""

    out: StoragePath
    """Its folder, for `retrieve`."""
    pictures: int
    lists: int
    recall: float | None
    """Of the ten nearest neighbours of a thousand pictures, the share that a search finds; None where all are compared.
    """
    record: Record = field(repr=False)


@dataclass(frozen=True)
class Neighbour:
    """One picture that is near a query."""

    cosine: float
    key: str
    uid: str
    shard: str
    url: str
    """Where the shard was; "" where the embeddings do not say."""


@dataclass(frozen=True)
class RetrieveResult:
    """The pictures nearest to a query."""

    page: StoragePath | None
    record: Record = field(repr=False)

    def rows(self) -> Iterator[Neighbour]:
        """The nearest first."""
        for hit in self.record["hits"]:
            yield Neighbour(*(hit[name] for name in ("cosine", "key", "uid", "shard", "url")))


def build_index(
    embeddings: Location,
    *,
    out: Location,
    address: str | None = None,
    workers: int = 0,
    cpus: float | None = None,
    on_progress: OnProgress | Progress | None = None,
    on_log: OnLog | None = None,
) -> IndexResult:
    """Make an index on disk of the vectors that `embed` wrote, for `retrieve` (docs/dedup.md).

    Args:
        embeddings: the run folder of an `embed` with a model.
        out: the folder of the index, or its URL.
        address: as in `select`; so are `workers`, `cpus`, `on_progress` and `on_log`.

    Raises:
        CapfiltError: FolderError where there are no embeddings, DataError for those without vectors or of two models,
            RunError where `out` is an index of others.
    """
    show = progress_of(on_progress, on_log)
    with show.wait("importing libraries"):
        from capfilt.pipelines.near import index as pipeline

    with arguments.working(show, out, address, {"workers": workers, "cpus": cpus}) as place:
        record = pipeline.run(place, location(embeddings))
    recall = record["recall"]
    share = recall["found"] / recall["neighbours"] if recall else None
    return IndexResult(place.out, record["rows"], record["lists"], share, record)


def retrieve(
    index: Location,
    text: str | None = None,
    *,
    image: Location | None = None,
    k: int = 20,
    model: Location | None = None,
    html: Location | None = None,
    on_progress: OnProgress | Progress | None = None,
    on_log: OnLog | None = None,
) -> RetrieveResult:
    """The pictures of an index that are nearest to a text or a picture.

    Args:
        index: what `build_index` made.
        text: what to look for, in words; or `image`, a picture.
        image: a file.
        k: how many.
        model: the model that made the vectors, where it is no longer where it was; for those of a copy-detection
            descriptor always, "copy=FILE".
        html: a page to write, with pictures from the shards.
        on_progress: as in `annotate`; so is `on_log`.

    Raises:
        CapfiltError: UsageError for no query, or a text where the descriptor reads none; FolderError where there is no
            index; DataError for another model than that of the index.
    """
    show = progress_of(on_progress, on_log)
    with show.wait("importing libraries"):
        from capfilt.pipelines.near import retrieve as pipeline

    picture, page = (located(where) for where in (image, html))
    record = pipeline.run(location(index), text, picture, k, named(model), page, show)
    return RetrieveResult(page, record)
