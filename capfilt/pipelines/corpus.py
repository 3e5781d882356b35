"""The data of a bootstrap: shards that the user names, or the embedded world, written into the run folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pydantic import model_validator

from capfilt.cluster.session import Session
from capfilt.cluster.spread import Resources
from capfilt.config import Config
from capfilt.data import shards, world
from capfilt.data.world import WorldConfig
from capfilt.pipelines.stage import run_stage
from capfilt.reports.ledger import Ledger, fingerprint
from capfilt.reports.progress import Progress
from capfilt.reports.tally import Tally

Shards = str | tuple[str, ...]


class DataConfig(Config):
    """Where the pairs come from: `world` alone, or shards by name. `data/shards.py` says what a name may be."""

    world: WorldConfig | None = None
    web: Shards | None = None
    """Noisy pairs, to be cleaned."""
    human: Shards | None = None
    """Clean pairs, on which captioner and filter are fine-tuned; they join every pretraining as they are."""
    val: Shards | None = None
    """Clean pairs that calibrate the filter's threshold."""
    test: Shards | None = None
    """Held-out pairs on which every round is evaluated; without them no figures."""

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        named = [split for split in world.SPLITS if getattr(self, split) is not None]
        if self.world is not None and named:
            raise ValueError(f"data has both the embedded world and shards ({', '.join(named)}); leave one out")
        if self.world is None and not {"web", "human"} <= set(named):
            raise ValueError("data needs `world`, or shards for `web` and `human` (`val` and `test` may be left out)")
        return self


class WorldJob(Config):
    """Writes splits of the world; an item is the name of a split."""

    out: Path
    world: WorldConfig
    seed: int

    @property
    def name(self) -> str:
        """The stage."""
        return "world"

    def identity(self, item: str) -> str:
        """The world's settings and its seed."""
        return fingerprint(item, self.world.model_dump(mode="json"), self.seed)

    def open(self) -> Callable[[str], str]:
        """Nothing to load."""

        def work(split: str) -> str:
            paths = world.write(self.world, self.seed, self.out, split)
            Ledger(self.out, self.name).commit(split, self.identity(split), paths, Tally.zero())
            return split

        return work


def gather(
    session: Session, config: DataConfig, seed: int, folder: Path, resources: Resources, show: Progress
) -> dict[str, list[str]]:
    """The shards of every split that there is, all of them found."""
    if config.world is None:
        named = {split: getattr(config, split) for split in world.SPLITS}
        return {split: shards.expand(spec) for split, spec in named.items() if spec is not None}
    splits = [split for split in world.SPLITS if world.count(config.world, split)]
    job = WorldJob(out=folder, world=config.world, seed=seed)
    folder.mkdir(exist_ok=True)
    run_stage(session, job, {split: split for split in splits}, resources, show, "write the world")
    return {split: shards.expand(str(folder / split)) for split in splits}
