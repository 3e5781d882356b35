"""The verbs that find copies of pictures, as functions, and what they return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from capfilt.api import arguments
from capfilt.api.arguments import Location, Settings, Specs, assignments, location, names_of
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

    @classmethod
    def of(cls, out: StoragePath, record: Record) -> EmbedResult:
        """From the record of the verb."""
        return cls(out, location(record["embeddings"]), Counts.of(record["samples"]), record["failed"], record)


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
        shards: tars, folders, globs, braces, fsspec URLs; one or several.
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
        from capfilt.pipelines import embed as pipeline
        from capfilt.stages import runner
        from capfilt.stages.embed import EmbedConfig

    config = configs.build(EmbedConfig, assignments(settings))
    with arguments.driving():
        folder = arguments.run_folder(out, fork)
        if retry is not None:
            runner.withdraw_failed(folder, "embed", retry)
        options = arguments.options(workers=workers, cpus=cpus, gpus=gpus, limit=limit, min_success=min_success)
        where, name = arguments.working_address(address), None if model is None else str(model)
        record = pipeline.run(where, names_of(shards), name, folder, config, options, show)
    return EmbedResult.of(folder, record)
