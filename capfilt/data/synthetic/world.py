"""The embedded world: endless small pictures with texts, drawn from a seed, so that the loop runs offline.

A sample is a pure function of (config, seed, split, index): it can be made alone, in any order, on any worker. Whether
a web text is true is in the json (`truth`) for evaluation only; nothing that trains or filters may read it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from pydantic import Field, field_validator

from capfilt.config import Config, added
from capfilt.data import shards
from capfilt.data.sample import Sample
from capfilt.data.synthetic import web_texts
from capfilt.data.synthetic.captions import captions, pick, say_thing
from capfilt.data.synthetic.painting import encode, paint
from capfilt.data.synthetic.scenes import APPEARANCES, BACKGROUNDS, HELD_OUT, Appearance, Scene, Thing
from capfilt.data.synthetic.web_texts import vocabulary
from capfilt.errors import DataError, did_you_mean
from capfilt.storage.paths import StoragePath

__all__ = ["HELD_OUT", "KINDS", "SPLITS", "Scene", "Thing", "WorldConfig"]
__all__ += ["captions", "count", "paint", "sample", "scene", "vocabulary", "write"]

SPLITS = ("web", "human", "val", "test")
KINDS = ("other", "boilerplate", "seo", "truncated", "attribute")
_TRAINED = tuple(appearance for appearance in APPEARANCES if appearance not in HELD_OUT)
_HELD_OUT = tuple(sorted(HELD_OUT))

_DIAMETERS = {"large": 0.46, "small": 0.32}  # of the side
_OFFSET = 0.02  # how far a thing lies from the middle of its cell at most, of the side


class WorldConfig(Config):
    """How much world there is, and how wrong its web is."""

    web: int = Field(4000, ge=0, description="images with one noisy text each")
    human: int = Field(400, ge=0, description="images with clean captions, for fine-tuning")
    val: int = Field(200, ge=0, description="images with clean captions, for choosing")
    test: int = Field(
        200, ge=0, description="images with clean captions, each with a held-out pair of colour and shape"
    )
    image_size: int = Field(32, ge=32, le=64, description="side of the square pictures, in pixels")
    noise: float = Field(0.55, ge=0, le=1, description="share of web texts that do not match their image")
    kinds: dict[str, float] = Field(
        default={"other": 0.3, "boilerplate": 0.15, "seo": 0.15, "truncated": 0.1, "attribute": 0.3},
        description="weights of the ways to be wrong; a kind that is not named never occurs",
    )
    objects: tuple[float, float, float] = Field((0.5, 0.45, 0.05), description="weights of 1, 2, 3 objects")
    captions: int = Field(5, ge=1, le=10, description="captions per image of the clean splits")
    regions: bool = added(False, description="whether the json says where each thing is, with a phrase for it")
    shard_size: int = Field(500, ge=1, le=10_000, description="samples per tar (keys have four digits for it)")

    @field_validator("kinds")
    @classmethod
    def _known_kinds(cls, kinds: dict[str, float]) -> dict[str, float]:
        for kind in kinds:
            if kind not in KINDS:
                raise ValueError(f"found kind '{kind}', allowed: {', '.join(KINDS)}.{did_you_mean(kind, KINDS)}")
        _check_weights(list(kinds.values()))
        return kinds

    @field_validator("objects")
    @classmethod
    def _some_objects(cls, weights: tuple[float, float, float]) -> tuple[float, float, float]:
        _check_weights(list(weights))
        return weights


def _check_weights(weights: list[float]) -> None:
    if not weights or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
        raise ValueError(f"found weights {weights}: none may be negative, their sum must be above 0")


def count(config: WorldConfig, split: str) -> int:
    """How many samples `split` has; DataError for a split that does not exist."""
    _check_split(split)
    return int(getattr(config, split))


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise DataError(f"found split '{split}', the world has {', '.join(SPLITS)}.{did_you_mean(split, SPLITS)}")


def _digest(seed: int, split: str, index: int, purpose: str) -> bytes:
    name = f"capfilt world|{seed}|{split}|{index}|{purpose}"
    return hashlib.blake2b(name.encode(), digest_size=16).digest()


def _stream(seed: int, split: str, index: int, purpose: str) -> np.random.Generator:
    # One stream per purpose: the same seed shows the same scenes whatever the noise or the picture's size.
    key = int.from_bytes(_digest(seed, split, index, purpose), "big")
    return np.random.Generator(np.random.Philox(key=key))


def scene(config: WorldConfig, seed: int, split: str, index: int) -> Scene:
    """What picture `index` of `split` shows: at least one held-out appearance in test, none in the other splits."""
    _check_split(split)
    rng = _stream(seed, split, index, "scene")
    weights = np.cumsum(config.objects)
    number = 1 + int(np.searchsorted(weights, rng.random() * weights[-1], side="right"))
    appearances = [pick(rng, _HELD_OUT if split == "test" else _TRAINED)]
    while len(appearances) < number:
        appearance = pick(rng, APPEARANCES if split == "test" else _TRAINED)
        if all(appearance[:2] != other[:2] for other in appearances):
            appearances.append(appearance)
    return Scene(_place(appearances, rng), pick(rng, BACKGROUNDS))


def _place(appearances: list[Appearance], rng: np.random.Generator) -> tuple[Thing, ...]:
    """Each appearance becomes a thing in its own cell of a 2 x 2 grid, a little off its middle.

    Shapes stay near the patches of a small vision transformer: placed freely, they take it minutes more to learn.
    """
    cells = rng.permutation(4)
    things = []
    for (colour, shape, size, texture), cell in zip(appearances, cells, strict=False):
        radius = _DIAMETERS[size] / 2 * rng.uniform(0.95, 1.05)
        dx, dy = rng.uniform(-_OFFSET, _OFFSET, 2)
        x, y = 0.25 + 0.5 * (cell % 2) + dx, 0.25 + 0.5 * (cell // 2) + dy
        things.append(Thing(shape, colour, size, texture, float(x), float(y), float(radius)))
    return tuple(things)


def _web_text(config: WorldConfig, seed: int, split: str, index: int, shown: Scene) -> tuple[str, str]:
    """A web text of `shown` and its kind: "right" or one of KINDS."""
    rng = _stream(seed, split, index, "text")
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
    """Sample `index` (from 0, without end) of `split`, as img2dataset would have stored it.

    The clean splits carry `meta["captions"]`, web samples `meta["truth"]`. DataError: no such split or index.
    """
    if index < 0:
        raise DataError(f"found index {index}, the world counts from 0: ask for an index of 0 or more.")
    shown = scene(config, seed, split, index)
    rng = _stream(seed, split, index, "image")
    image, extension = encode(paint(shown, config.image_size, rng), rng)
    key = f"{index // config.shard_size:05d}{index % config.shard_size:04d}"
    meta: dict[str, Any] = {
        "uid": _digest(seed, split, index, "uid").hex(),
        "sha256": hashlib.sha256(image).hexdigest(),
        "url": f"https://world.invalid/{seed}/{split}/{index}.{extension}",
        "key": key,
        "status": "success",
        "error_message": None,
        **dict.fromkeys(("width", "height", "original_width", "original_height"), config.image_size),
    }
    if split == "web":
        text, kind = _web_text(config, seed, split, index, shown)
        meta["truth"] = {"matches": kind == "right", "kind": kind}
    else:
        texts = captions(shown, _stream(seed, split, index, "text"), config.captions)
        text = texts[0]
        meta["captions"] = [{"text": caption, "source": "human"} for caption in texts]
    if config.regions:
        voices = _stream(seed, split, index, "regions")
        meta["regions"] = [
            {"box": box(thing, config.image_size), "text": say_thing(thing, voices)} for thing in shown.things
        ]
    meta["caption"] = text
    return Sample(key=key, image=image, extension=extension, text=text, meta=meta)


def box(thing: Thing, side: int) -> list[int]:
    """Where a thing is in a picture of this side, [x, y, w, h] in whole pixels around it."""
    radius = thing.radius * side
    (left, right), (top, bottom) = (
        (max(0, int(middle * side - radius)), min(side, math.ceil(middle * side + radius)))
        for middle in (thing.x, thing.y)
    )
    return [left, top, right - left, bottom - top]


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
    return paths
