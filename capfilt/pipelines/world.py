"""world: the embedded world as shards, for a command that reads shards. bootstrap writes its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from capfilt import config as configs
from capfilt.data.synthetic import world
from capfilt.data.synthetic.world import SPLITS, TASKS, WorldConfig
from capfilt.errors import UsageError, did_you_mean
from capfilt.runs.progress import Progress
from capfilt.storage.paths import StoragePath


def run(names: Sequence[str], sets: Sequence[str], seed: int, out: StoragePath, progress: Progress) -> dict[str, Any]:
    """The verb: write splits, each into the folder of its name; returns their folders and how many samples they have.
    A task's name stands for its splits; without any name, the splits of pairs are written.

    Raises:
        UsageError: there is no split or task of that name.
        DataError: a folder holds tars that this world would not overwrite.
    """
    config = configs.build(WorldConfig, sets)
    written: dict[str, Any] = {}
    for split in dict.fromkeys(split for name in names or SPLITS for split in _splits(name)):
        with progress.wait(f"writing {split}"):
            world.write(config, seed, out, split)
        written[split] = {"shards": str(out / split), "samples": world.count(config, split)}
    return written


def _splits(name: str) -> tuple[str, ...]:
    tasks = {split: (split,) for splits in TASKS.values() for split in splits} | {**TASKS}
    splits = {split: (split,) for split in SPLITS} | tasks
    if name not in splits:
        allowed = (*SPLITS, *TASKS)
        raise UsageError(f"the world has no {name!r}; it has {', '.join(allowed)}.{did_you_mean(name, allowed)}")
    return splits[name]
