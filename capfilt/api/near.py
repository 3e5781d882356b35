"""The verbs of near pictures as functions, and what they return: `embed`, `dedup`, `build_index`, `retrieve`,
`decontaminate`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from capfilt.api import arguments
from capfilt.api.arguments import Location, Settings, Specs, assignments, located, location, named, names_of
from capfilt.api.progress import OnLog, OnProgress, progress_of
from capfilt.api.results import Counts, Record

if TYPE_CHECKING:
    from capfilt.runs.progress import Progress
    from capfilt.storage.paths import StoragePath

BY = "sha256,phash:6,text:6"
"""What makes a suspect where nothing is said."""


@dataclass(frozen=True)
class EmbedResult:
    """Hashes of pictures, and vectors."""

    out: StoragePath
    """The run folder."""
    embeddings: StoragePath
    """The folder with one Parquet a shard."""
    samples: Counts
    failed: Mapping[str, int]
    """How many pictures failed, by reason."""
    record: Record = field(repr=False)


@dataclass(frozen=True)
class DedupResult:
    """Which pictures are copies, and of which."""

    out: StoragePath
    """The run folder: what `select` and `annotate` take as `without`."""
    duplicates: StoragePath
    """The folder with one Parquet a shard, a row for each picture that goes."""
    num_in: int
    kept: int
    dropped: int
    by: Mapping[str, int]
    """How many go by each kind: sha256, phash, vector."""
    record: Record = field(repr=False)

    def rows(self) -> Iterator[Record]:
        """What goes and why, by the columns of docs/dedup.md, one shard in memory at a time."""
        from capfilt.data import duplicates
        from capfilt.storage.paths import listing

        for name in sorted(listing(self.duplicates)):
            yield from duplicates.read(self.duplicates / name).to_pylist()


def embed(
    shards: Specs,
    *,
    out: Location,
    model: Location | None = None,
    settings: Settings = (),
    address: str | None = None,
    workers: int = 0,
    cpus: float | None = None,
    gpus: float | None = None,
    limit: float = 0,
    retry: str | None = None,
    min_success: float = 0,
    fork: Location | None = None,
    on_progress: OnProgress | Progress | None = None,
    on_log: OnLog | None = None,
) -> EmbedResult:
    """Hash every picture of shards and, with a model, make a vector of it: what `dedup` compares (docs/dedup.md).

    Args:
        shards: tars, or other data (docs/shards.md), by folders, globs, braces, fsspec URLs; one or several.
        out: the run folder, or its URL.
        model: a model that compares images and texts, or "copy=FILE" for a TorchScript descriptor, whose code is run;
            by default there are hashes and no vectors.
        settings: such as `{"batch_size": 128}`; for a descriptor `size` and `preprocess`.
        address: as in `select`; so are `workers`, `cpus`, `min_success`, `fork`, `on_progress` and `on_log`.
        gpus: as in `annotate`; so are `limit` and `retry`.

    Raises:
        CapfiltError: RecipeError for a model without such vectors, ShortfallError where too few pictures could be
            read, and its other kin.
    """
    from capfilt import config as configs

    show = progress_of(on_progress, on_log)
    with show.wait("importing libraries"):
        from capfilt.pipelines.near import embed as pipeline
        from capfilt.stages.near.embed import EmbedConfig

    config = configs.build(EmbedConfig, assignments(settings))
    sizes = {"workers": workers, "cpus": cpus, "gpus": gpus, "limit": limit, "min_success": min_success}
    with arguments.working(show, out, address, sizes, fork, ("embed", retry)) as place:
        record = pipeline.run(place, names_of(shards), named(model), config)
    counts = Counts.of(record["samples"]), record["failed"]
    return EmbedResult(place.out, location(record["embeddings"]), *counts, record)


def dedup(
    embeddings: Location | EmbedResult,
    *,
    out: Location,
    by: str = "sha256,phash:3",
    keep: Literal["best", "largest", "first"] = "best",
    scope: Literal["pool", "shard"] = "pool",
    scores: Location | None = None,
    merge_texts: bool = False,
    fetch_inputs: bool = False,
    address: str | None = None,
    workers: int = 0,
    cpus: float | None = None,
    on_progress: OnProgress | Progress | None = None,
    on_log: OnLog | None = None,
) -> DedupResult:
    """Find copies of pictures: one stays, and each other one is named with the one that stands for it (docs/dedup.md).

    Args:
        embeddings: the run folder of `embed`, its result, or one of `annotate` with `keep_vectors`.
        out: the run folder, or its URL.
        by: what counts as near: "sha256", "phash:BITS" and "vector:COSINE", separated by commas.
        keep: which of near pictures stays: "best" of the highest score, then the most pixels; "largest"; "first".
        scope: copies in the whole "pool", or only within each "shard".
        scores: the run folder of an `annotate` of the same shards, whose scores say which picture is best.
        merge_texts: hand the texts of copies to the picture that stays, for `annotate(without=...)`.
        fetch_inputs: read shards wherever the run folder of `embed` names them, which `merge_texts` does.
        address: as in `select`; so are `workers`, `cpus`, `on_progress` and `on_log`.

    Raises:
        CapfiltError: UsageError for a radius that cannot be, DataError for vectors of two models, and its other kin.
    """
    from capfilt import config as configs
    from capfilt.index.near import parse_near

    near = parse_near(by)
    show = progress_of(on_progress, on_log)
    with show.wait("importing libraries"):
        from capfilt.pipelines.near import dedup as pipeline

    given = {"by": near, "keep": keep, "scope": scope, "merge_texts": merge_texts}
    config = configs.validate(pipeline.DedupConfig, given, "arguments")
    source = embeddings.out if isinstance(embeddings, EmbedResult) else location(embeddings)
    sources = pipeline.Sources(source, located(scores), fetch_inputs)
    with arguments.working(show, out, address, {"workers": workers, "cpus": cpus}) as place:
        record = pipeline.run(place, sources, config)
    counts = record["pictures"], record["kept"], record["dropped"]
    return DedupResult(place.out, location(record["folder"]), *counts, record["by"], record)


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
