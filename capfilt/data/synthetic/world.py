"""The embedded world: endless small pictures with texts, drawn from a seed, so that the loop runs offline.

A sample is a pure function of (config, seed, split, index): it can be made alone, in any order, on any worker. Whether
a web text is true is in the json (`truth`) for evaluation only; nothing that trains or filters may read it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from capfilt.data import shards
from capfilt.data.sample import Sample
from capfilt.data.synthetic import tasks, web_texts
from capfilt.data.synthetic.captions import captions, say_thing
from capfilt.data.synthetic.drawing import KINDS, WorldConfig, box, draw_scene, picture, stream
from capfilt.data.synthetic.painting import paint
from capfilt.data.synthetic.scenes import HELD_OUT, Scene, Thing
from capfilt.data.synthetic.tasks import TASKS
from capfilt.data.synthetic.web_texts import vocabulary
from capfilt.errors import DataError, did_you_mean
from capfilt.storage.atomic import atomic
from capfilt.storage.paths import StoragePath

__all__ = ["HELD_OUT", "KINDS", "SPLITS", "TASKS", "Scene", "Thing", "WorldConfig", "box"]
__all__ += ["captions", "count", "paint", "sample", "scene", "vocabulary", "write"]

SPLITS = ("web", "human", "val", "test")


def count(config: WorldConfig, split: str) -> int:
    """How many samples `split` has; DataError for a split that does not exist."""
    if split in tasks.SPLITS:
        return config.task_test if split.endswith("-test") else config.task_train
    _check_split(split)
    return int(getattr(config, split))


def _check_split(split: str) -> None:
    if split not in SPLITS:
        every = (*SPLITS, *tasks.SPLITS)
        raise DataError(f"found split '{split}', the world has {', '.join(every)}.{did_you_mean(split, every)}")


def scene(config: WorldConfig, seed: int, split: str, index: int) -> Scene:
    """What picture `index` of `split` shows: at least one held-out appearance in test, none in the other splits."""
    _check_split(split)
    return draw_scene(stream(seed, split, index, "scene"), config.objects, split == "test")


def _web_text(config: WorldConfig, seed: int, split: str, index: int, shown: Scene) -> tuple[str, str]:
    """A web text of `shown` and its kind: "right" or one of KINDS."""
    rng = stream(seed, split, index, "text")
    if rng.random() >= config.noise:
        return web_texts.right(shown, rng), "right"
    ways: dict[str, Callable[[], str]] = {
        "other": lambda: web_texts.other(shown, rng, lambda i: scene(config, seed, split, i)),
        "boilerplate": lambda: web_texts.boilerplate(rng),
        "seo": lambda: web_texts.seo(shown, rng),
        "truncated": lambda: web_texts.truncated(shown, rng),
        "attribute": lambda: web_texts.attribute(shown, rng),
    }
    weights = np.cumsum([config.kinds.get(kind, 0.0) for kind in KINDS])
    kind = KINDS[int(np.searchsorted(weights, rng.random() * weights[-1], side="right"))]
    return ways[kind](), kind


def sample(config: WorldConfig, seed: int, split: str, index: int) -> Sample:
    """Sample `index` (from 0, without end) of `split`, as img2dataset would have stored it; of a task, one of `TASKS`.

    The clean splits carry `meta["captions"]`, web samples `meta["truth"]`. DataError: no such split or index.
    """
    if index < 0:
        raise DataError(f"found index {index}, the world counts from 0: ask for an index of 0 or more.")
    if split in tasks.SPLITS:
        return tasks.sample(config, seed, split, index)
    shown = scene(config, seed, split, index)
    made = picture(config, seed, split, index, shown)
    meta = dict(made.meta)
    if split == "web":
        text, kind = _web_text(config, seed, split, index, shown)
        meta["truth"] = {"matches": kind == "right", "kind": kind}
    else:
        texts = captions(shown, stream(seed, split, index, "text"), config.captions)
        text = texts[0]
        meta["captions"] = [{"text": caption, "source": "human"} for caption in texts]
    if config.regions:
        voices = stream(seed, split, index, "regions")
        meta["regions"] = [
            {"box": box(thing, config.image_size), "text": say_thing(thing, voices)} for thing in shown.things
        ]
    meta["caption"] = text
    return replace(made, text=text, meta=meta)


def write(config: WorldConfig, seed: int, folder: StoragePath, split: str) -> list[StoragePath]:
    """Write `split` as folder/split/00000.tar ... with sizes.json, and return the tars in order.

    DataError if folder/split holds tars that this split would not overwrite: they would be read with it.
    """
    total, step = count(config, split), config.shard_size
    home = folder / split
    paths = [home / f"{number:05d}.tar" for number in range(-(-total // step))]
    present: set[StoragePath] = {*home.glob("*.tar")}
    others = sorted(path.name for path in present - {*paths})
    if others:
        raise DataError(f"{home} already holds {others[0]}, not part of this world: use an empty folder.")
    home.mkdir(parents=True, exist_ok=True)
    counts = {}
    for number, path in enumerate(paths):
        indices = range(number * step, min(total, (number + 1) * step))
        counts[path.name] = shards.write(path, (sample(config, seed, split, index) for index in indices))
    shards.write_sizes(home, counts)
    for name, text in tasks.files_beside(split).items():
        with atomic(home / name) as file:
            file.write(text.encode())
    return paths
