"""The verbs that make shards of what others published, as functions, and what they return."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from capfilt.api import arguments
from capfilt.api.arguments import Location, Settings, Specs, assignments, names_of
from capfilt.api.progress import OnLog, OnProgress, progress_of
from capfilt.api.results import Counts, Record, TextCounts

if TYPE_CHECKING:
    from capfilt.data.sample import Sample
    from capfilt.runs.progress import Progress
    from capfilt.storage.paths import StoragePath


@dataclass(frozen=True)
class ShardsResult:
    """Shards that a verb wrote."""

    out: StoragePath
    """The run folder, in which the tars lie."""
    samples: Counts
    """Rows of lists, pictures, or pairs of them; none is dropped."""
    failed: Mapping[str, int]
    """How many of them failed, by reason."""
    record: Record = field(repr=False)

    def rows(self) -> Iterator[Sample]:
        """The samples that came, streamed from the tars."""
        from capfilt.api.reading import read_shards

        return read_shards(self.out)


@dataclass(frozen=True)
class DownloadResult(ShardsResult):
    """Shards of downloaded images."""

    repeated: Mapping[str, int]
    """The most frequent images whose bytes came under several URLs: sha256, and number of URLs."""


@dataclass(frozen=True)
class ConvertResult(ShardsResult):
    """Shards of a downstream task's data set."""

    by_kind: Mapping[str, Record]
    """By kind, such as "questions": how many rows came "in", were "kept" and "failed", and the reasons, "why"."""


@dataclass(frozen=True)
class PackResult(ShardsResult):
    """Shards of data that were something else."""


@dataclass(frozen=True)
class DataExportResult:
    """Data as another tool reads them."""

    out: StoragePath
    """The run folder, in which the files lie."""
    form: str
    written: tuple[StoragePath, ...]
    """What is one file for all of the data: a list, an array, sizes.json."""
    samples: Counts
    """Dropped are those without a text, where the format is one of texts."""
    texts: TextCounts
    record: Record = field(repr=False)


def download(
    urls: Specs,
    *,
    out: Location,
    url_col: str | None = None,
    caption_col: str | None = None,
    input_format: str | None = None,
    contact: str | None = None,
    settings: Settings = (),
    retry: Sequence[str] = (),
    min_success: float = 0,
    drop_placeholders: int = 0,
    address: str | None = None,
    workers: int = 0,
    fork: Location | None = None,
    on_progress: OnProgress | Progress | None = None,
    on_log: OnLog | None = None,
) -> DownloadResult:
    """Download lists of URLs into shards, as img2dataset does, politely and safely.

    Args:
        urls: lists: csv, tsv, txt, json, jsonl, Parquet; files, folders, globs, fsspec URLs.
        out: the run folder, or its URL.
        url_col: the column of URLs; by default "url".
        caption_col: the column of texts; by default there is none.
        input_format: by default each list's format follows from its name.
        contact: a page or an address, sent to the servers with every request.
        settings: all else, by the names that docs/download.md lists: `{"image_size": 256, "manners.host_rate": 2}`.
        retry: "failed", or kinds of failure such as "timeout" or "http-429", to try again.
        min_success: the share of URLs that must come through.
        drop_placeholders: fail images whose bytes came under so many URLs; 0 for none.
        address: as in `annotate`; so are `workers`, `fork`, `on_progress` and `on_log`.

    Raises:
        CapfiltError: RecipeError or UsageError for lists or settings that cannot be, ShortfallError where too little
            came, and its other kin.
    """
    from capfilt import config as configs

    show = progress_of(on_progress, on_log)
    with show.wait("importing libraries"):
        from capfilt.pipelines import download as pipeline
        from capfilt.stages.download import DownloadConfig, DownloadOptions

    given = {"url_col": url_col, "caption_col": caption_col, "input_format": input_format}
    sets = assignments(settings, urls=names_of(urls), **given, **{"manners.contact": contact})
    config = configs.build(DownloadConfig, sets)
    given_options = {"retry": tuple(retry), "min_success": min_success, "drop_placeholders": drop_placeholders}
    wanted = configs.validate(DownloadOptions, given_options, "arguments")
    with arguments.working(show, out, address, {"workers": workers}, fork) as place:
        record = pipeline.run(place, config, wanted)
    return DownloadResult(place.out, Counts.of(record["samples"]), record["failed"], record, record["repeated"])


def convert(
    task: str,
    files: Specs,
    *,
    images: Location,
    out: Location,
    split: Sequence[str] = (),
    shard_size: int | None = None,
    retry: str | None = None,
    min_success: float = 0,
    address: str | None = None,
    workers: int = 0,
    cpus: float | None = None,
    on_progress: OnProgress | Progress | None = None,
    on_log: OnLog | None = None,
) -> ConvertResult:
    """Make shards of a downstream task's data set from the files in which it is published (docs/tasks.md).

    Args:
        task: "vqa", "nlvr2", "entailment", "grounding", "dialog", "retrieval", "captioning".
        files: the published files of the data set, in any order.
        images: the folder of its pictures, or one above; their bytes are copied as they are.
        out: the run folder, or its URL, in which the tars will lie.
        split: which splits, where the files hold several.
        shard_size: pictures of a shard; by default 1000.
        retry: "failed" looks for missing and broken pictures again.
        min_success: the share of the pictures that must be usable.
        address: as in `select`; so are `workers`, `cpus`, `on_progress` and `on_log`.

    Raises:
        CapfiltError: UsageError for files, splits or a folder that are not there, DataError for files of another task,
            ShortfallError where no picture could be used, and its other kin.
    """
    from capfilt import config as configs

    show = progress_of(on_progress, on_log)
    with show.wait("importing libraries"):
        from capfilt.pipelines import convert as pipeline
        from capfilt.stages.convert import ConvertConfig

    splits = (split,) if isinstance(split, str) else tuple(split)
    given = {"task": task, "files": names_of(files), "images": str(images), "split": splits, "shard_size": shard_size}
    config = configs.validate(ConvertConfig, {k: v for k, v in given.items() if v is not None}, "arguments")
    sizes = {"workers": workers, "cpus": cpus, "min_success": min_success}
    with arguments.working(show, out, address, sizes) as place:
        record = pipeline.run(place, config, retry)
    return ConvertResult(place.out, Counts.of(record["samples"]), record["failed"], record, record["rows"])


def export_data(
    data: Location,
    *,
    out: Location,
    form: str,
    samples_per_shard: int = 0,
    image_root: str | None = None,
    fetch_inputs: bool = False,
    min_success: float = 0,
    address: str | None = None,
    workers: int = 0,
    cpus: float | None = None,
    on_progress: OnProgress | Progress | None = None,
    on_log: OnLog | None = None,
) -> DataExportResult:
    """Write data as another tool reads them (docs/exports.md).

    Args:
        data: the run folder of `select` or `annotate`, a round of a bootstrap, or shards.
        out: the run folder, or its URL, in which the files will lie.
        form: "webdataset", "parquet", "hf-dataset", "coyo", "laion-coco", "blip-json", "datacomp-npy", "llava-json",
            "open-clip-csv".
        samples_per_shard: of webdataset, parquet and hf-dataset, samples of a file at most; 0 for a file a shard.
        image_root: of blip-json and open-clip-csv, what stands before the paths of pictures; by default `out`.
        fetch_inputs: read shards that the plan of a run names elsewhere, too: do you trust it?
        min_success: the share of the samples that must be readable.
        address: as in `select`; so are `workers`, `cpus`, `on_progress` and `on_log`.

    Raises:
        CapfiltError: UsageError for an unknown form or no data, RunError for counts that are not those of the run that
            the data come from, ShortfallError where nothing could be written, and its other kin.
    """
    from capfilt import config as configs

    show = progress_of(on_progress, on_log)
    with show.wait("importing libraries"):
        from capfilt.pipelines import export_data as pipeline
        from capfilt.stages.export import ExportConfig

    given = {"form": form, "samples_per_shard": samples_per_shard, "image_root": image_root}
    config = configs.validate(ExportConfig, given, "arguments")
    sizes = {"workers": workers, "cpus": cpus, "min_success": min_success}
    with arguments.working(show, out, address, sizes) as place:
        record = pipeline.run(place, str(data), config, fetch_inputs)
    written = tuple(arguments.location(path) for path in record["written"])
    samples, texts = Counts.of(record["samples"]), TextCounts.of(record["texts"])
    return DataExportResult(place.out, form, written, samples, texts, record)


def pack(
    data: Specs,
    *,
    out: Location,
    min_success: float = 0,
    address: str | None = None,
    workers: int = 0,
    cpus: float | None = None,
    on_progress: OnProgress | Progress | None = None,
    on_log: OnLog | None = None,
) -> PackResult:
    """Write data as tars once: folders of pictures, Parquet, saved datasets, Lance, captions (docs/shards.md).

    Args:
        data: what `annotate` takes as shards; one or several.
        out: the run folder, or its URL, in which the tars will lie.
        min_success: the share of the samples that must be readable.
        address: as in `select`; so are `workers`, `cpus`, `on_progress` and `on_log`.

    Raises:
        CapfiltError: ShardError for what cannot be read, ShortfallError where no sample could be, and its other kin.
    """
    show = progress_of(on_progress, on_log)
    with show.wait("importing libraries"):
        from capfilt.pipelines import pack as pipeline

    sizes = {"workers": workers, "cpus": cpus, "min_success": min_success}
    with arguments.working(show, out, address, sizes) as place:
        record = pipeline.run(place, names_of(data))
    return PackResult(place.out, Counts.of(record["samples"]), record["failed"], record)
