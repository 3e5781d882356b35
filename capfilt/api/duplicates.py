"""The verbs that find copies of pictures, as functions, and what they return."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from capfilt.api import arguments
from capfilt.api.arguments import Location, Settings, Specs, assignments, located, location, named, names_of
from capfilt.api.progress import OnLog, OnProgress, progress_of
from capfilt.api.results import Counts, Record

if TYPE_CHECKING:
    from capfilt.runs.progress import Progress
    from capfilt.storage.paths import StoragePath


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
