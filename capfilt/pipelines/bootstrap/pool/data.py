"""The data of a bootstrap: shards that the recipe names or lists of URLs that are downloaded, or the embedded world."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from capfilt.cluster.session import Session
from capfilt.cluster.worker_pool import Resources
from capfilt.config import Config, added
from capfilt.data import shards
from capfilt.data.sample import FailedSample, Sample
from capfilt.data.synthetic import world
from capfilt.data.synthetic.world import WorldConfig
from capfilt.errors import DataError, UsageError
from capfilt.runs.progress import Progress
from capfilt.runs.tally import NO_TEXT
from capfilt.stages.download import DownloadConfig, check_success_rate, download, list_identities
from capfilt.stages.near.decontaminate.criteria import Criteria
from capfilt.stages.runner import run_stage
from capfilt.stages.world import WorldJob
from capfilt.storage import documents
from capfilt.storage.atomic import write_json
from capfilt.storage.paths import StoragePath, make_folder

Shards = str | tuple[str, ...]


class DedupSection(Config):
    """Copies in the web go, before round 0."""

    by: str = "sha256,phash:3"
    """What makes two pictures copies, as `capfilt dedup --by`, of hashes: sha256, phash:BITS."""
    keep: Literal["largest", "first"] = "largest"
    """Which of them stays: the one with the most pixels, or the first."""
    merge_texts: bool = False
    """Whether the picture that stays is given the texts of its copies, to be scored like its own."""

    @field_validator("by")
    @classmethod
    def _known(cls, value: str) -> str:
        return _of_hashes(value)


class DecontaminateSection(Config):
    """Held-out pictures in the web go, before round 0: those of `val` and `test`, and of further sets."""

    by: str = "sha256,phash:6"
    """What makes a suspect, as `capfilt decontaminate --by`, of hashes and texts: sha256, phash:BITS, text:WORDS."""
    against: dict[str, Shards] = {}
    """Further held-out sets by name: shards, or folders of pictures."""
    self_test: int = Field(default=200, ge=1)
    """Held-out pictures of which copies are made, to see which of them would be found."""

    @field_validator("by")
    @classmethod
    def _known(cls, value: str) -> str:
        return _of_hashes(value)


def _of_hashes(by: str) -> str:
    """Check what makes two pictures near; the web is embedded without a model here."""
    try:
        criteria = Criteria.parse(by)
    except UsageError as error:
        raise ValueError(str(error)) from None
    if criteria.within("vector") is not None:
        raise ValueError("vectors take a model: run `capfilt embed`, dedup and decontaminate on the web beforehand")
    return by


class DataConfig(Config):
    """Where the pairs come from: `world` alone, or shards by name."""

    world: WorldConfig | None = None
    """The embedded world, drawn from the seed; no network and no files."""
    web: Shards | None = None
    """Noisy pairs, to be cleaned."""
    download: DownloadConfig | None = None
    """Lists of URLs to begin with, in place of `web`."""
    human: Shards | None = None
    """Clean pairs, on which captioner and filter are fine-tuned; they join every pretraining as they are."""
    val: Shards | None = None
    """Clean pairs that calibrate the filter's threshold."""
    test: Shards | None = None
    """Held-out pairs on which every round is evaluated; without them no figures."""
    dedup: DedupSection | None = added(None)
    """Copies in the web go, before round 0; {}: as its defaults say."""
    decontaminate: DecontaminateSection | None = added(None)
    """Held-out pictures in the web go, before round 0; {}: as its defaults say."""
    allow_contamination: bool = added(False)
    """Whether a run may go on although pictures of `val` or `test` are, byte for byte, among those that are trained
    on."""

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        named = [split for split in world.SPLITS if self._given(split)]
        if self.download is not None and self.web is not None:
            raise ValueError("data has both `web` shards and a `download` of them; leave one out")
        if self.world is not None and named:
            raise ValueError(f"data has both the embedded world and shards ({', '.join(named)}); leave one out")
        if self.world is None and not {"web", "human"} <= set(named):
            raise ValueError(
                "data needs `world`, or `human` shards and `web` shards (or a `download`); `val` and `test` are free"
            )
        if self.world is not None and not (self.world.web and self.world.human):
            raise ValueError("data.world needs at least one image in `web` and one in `human`")
        return self

    def has(self, split: str) -> bool:
        return self._given(split) if self.world is None else world.count(self.world, split) > 0

    def _given(self, split: str) -> bool:
        return getattr(self, split) is not None or (split == "web" and self.download is not None)


def named_shards(config: DataConfig) -> dict[str, list[str]]:
    """The URLs of the shards that the recipe names, by split; {} where the data is the world.

    Raises ShardError for a name that leads to no shard.
    """
    named = {split: getattr(config, split) for split in world.SPLITS}
    return {split: shards.expand(spec) for split, spec in named.items() if spec is not None}


def input_names(config: DataConfig) -> dict[str, Any]:
    """What a run's plan says about its data: the names of the shards, and the identities of lists of URLs."""
    named: dict[str, Any] = {split: [shards.name(url) for url in urls] for split, urls in named_shards(config).items()}
    return named if config.download is None else {**named, "lists": list_identities(config.download)}


def prepare_data(
    session: Session,
    config: DataConfig,
    seed: int,
    folder: StoragePath,
    resources: Resources,
    progress: Progress,
    more: Sequence[str] = (),
) -> dict[str, list[str]]:
    """Download or write what is not there yet, also `more` splits of the embedded world; returns the URLs of the shards
    of every split.

    Raises:
        DataError: a split without any usable sample.
        ShortfallError: a download that brought too little.
    """
    if config.world is None:
        splits = named_shards(config)
        if config.download is not None:
            splits = {"web": download_web(session, config.download, folder / "web", resources, progress), **splits}
        for split, urls in splits.items():
            check_not_empty(split, urls)
        return splits
    written = [split for split in (*world.SPLITS, *more) if world.count(config.world, split)]
    job = WorldJob(out=folder, world=config.world, seed=seed)
    make_folder(folder)
    run_stage(session, job, {split: split for split in written}, resources, progress, "write the world")
    return {split: shards.expand(str(folder / split)) for split in written}


def download_web(
    session: Session, config: DownloadConfig, out: StoragePath, resources: Resources, progress: Progress
) -> list[str]:
    """Download into `out`, or resume it; returns the URLs of the shards. ShortfallError where too little came."""
    make_folder(out)
    summary = download(session, config, out, resources, progress)
    path = out / "summary.json"
    if not path.is_file() or documents.read_json(path) != summary:
        write_json(path, summary)
    check_success_rate("data.download", summary)
    return shards.expand(str(out))


def check_not_empty(split: str, urls: Sequence[str]) -> None:
    """Raise DataError unless at least one sample can be used, before anything is trained on the other splits.

    A web image needs no text: it is captioned. Elsewhere a sample without a text is of no use.
    """
    fault: FailedSample | None = None
    for item in itertools.chain.from_iterable(shards.read(url) for url in urls):
        if isinstance(item, Sample) and (split == "web" or item.captions):
            return
        fault = fault or (FailedSample(item.key, NO_TEXT) if isinstance(item, Sample) else item)
    reason = f"the first fault: {fault.key}: {fault.reason}" if fault else "no sample is in it"
    raise DataError(f"data.{split} is empty: none of its {len(urls)} shards (first {urls[0]}) can be used; {reason}.")
