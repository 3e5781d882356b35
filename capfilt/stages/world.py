"""world: writes splits of the embedded world as shards. A step of bootstrap, not a verb."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from capfilt.config import Config
from capfilt.data.synthetic import world
from capfilt.data.synthetic.world import WorldConfig
from capfilt.runs.ledger import Ledger, fingerprint
from capfilt.runs.tally import Tally
from capfilt.storage.paths import StoragePath


class WorldJob(Config):
    """Writes splits of the world; an item is the name of a split."""

    name: ClassVar[str] = "world"

    out: StoragePath
    world: WorldConfig
    seed: int

    def identity(self, item: str) -> str:
        """The world's settings and its seed; how many pictures tasks have is nothing to other splits."""
        others = {"task_train", "task_test"} if item in world.SPLITS else set()
        return fingerprint(item, self.world.model_dump(mode="json", exclude=others), self.seed)

    def open(self) -> Callable[[str], str]:
        def work(split: str) -> str:
            paths = world.write(self.world, self.seed, self.out, split)
            Ledger(self.out, self.name).commit(split, self.identity(split), paths, Tally.zero())
            return split

        return work
