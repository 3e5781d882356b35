"""What is drawn of the embedded world: its settings, its streams of random numbers, its scenes and their pictures."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field, field_validator

from capfilt.config import Config, added
from capfilt.data.sample import Sample
from capfilt.data.synthetic.captions import pick
from capfilt.data.synthetic.painting import encode, paint
from capfilt.data.synthetic.scenes import APPEARANCES, BACKGROUNDS, HELD_OUT, Appearance, Scene, Thing
from capfilt.errors import did_you_mean

KINDS = ("other", "boilerplate", "seo", "truncated", "attribute")
_TRAINED = tuple(appearance for appearance in APPEARANCES if appearance not in HELD_OUT)
_HELD_OUT = tuple(sorted(HELD_OUT))

_DIAMETERS = {"large": 0.46, "small": 0.32}  # of the side
_OFFSET = 0.02  # how far a thing lies from the middle of its cell at most, of the side

Weights = tuple[float, float, float]
"""Of 1, 2 and 3 things in a scene."""


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
    task_train: int = added(2000, ge=1, description="pictures of a task to fine-tune on")
    task_test: int = added(400, ge=1, description="pictures of a task to measure on, each with a held-out appearance")
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


def digest(seed: int, split: str, index: int, purpose: str) -> bytes:
    """16 bytes for one purpose of one sample."""
    name = f"capfilt world|{seed}|{split}|{index}|{purpose}"
    return hashlib.blake2b(name.encode(), digest_size=16).digest()


def stream(seed: int, split: str, index: int, purpose: str) -> np.random.Generator:
    """Random numbers for one purpose of one sample."""
    # One stream per purpose: the same seed shows the same scenes whatever the noise or the picture's size.
    key = int.from_bytes(digest(seed, split, index, purpose), "big")
    return np.random.Generator(np.random.Philox(key=key))


def allowed(held_out: bool) -> tuple[Appearance, ...]:
    """What the things of a split may look like: of one that shows held-out appearances everything, else the rest."""
    return APPEARANCES if held_out else _TRAINED


def draw_scene(rng: np.random.Generator, weights: Weights, held_out: bool, shown: Sequence[Appearance] = ()) -> Scene:
    """A scene: with `held_out` at least one of its appearances is held out, without it none. `shown`: what some of its
    things look like, of different colours or shapes."""
    sums = np.cumsum(weights)
    number = 1 + int(np.searchsorted(sums, rng.random() * sums[-1], side="right"))
    appearances = list(shown)
    lacks = held_out and not HELD_OUT.intersection(shown)
    while lacks or len(appearances) < max(1, number):
        appearance = pick(rng, _HELD_OUT if lacks else allowed(held_out))
        if all(appearance[:2] != other[:2] for other in appearances):
            appearances.append(appearance)
            lacks = False
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


def picture(config: WorldConfig, seed: int, split: str, index: int, shown: Scene) -> Sample:
    """A scene as sample `index` of a split, as img2dataset would have stored it; without a text."""
    rng = stream(seed, split, index, "image")
    image, extension = encode(paint(shown, config.image_size, rng), rng)
    key = f"{index // config.shard_size:05d}{index % config.shard_size:04d}"
    meta: dict[str, Any] = {
        "uid": digest(seed, split, index, "uid").hex(),
        "sha256": hashlib.sha256(image).hexdigest(),
        "url": f"https://world.invalid/{seed}/{split}/{index}.{extension}",
        "key": key,
        "status": "success",
        "error_message": None,
        **dict.fromkeys(("width", "height", "original_width", "original_height"), config.image_size),
    }
    return Sample(key=key, image=image, extension=extension, text="", meta=meta)


def box(thing: Thing, side: int) -> list[int]:
    """Where a thing is in a picture of this side, [x, y, w, h] in whole pixels around it."""
    radius = thing.radius * side
    (left, right), (top, bottom) = (
        (max(0, int(middle * side - radius)), min(side, math.ceil(middle * side + radius)))
        for middle in (thing.x, thing.y)
    )
    return [left, top, right - left, bottom - top]
