"""The embedded world: endless small pictures with texts, drawn from a seed, so that the loop runs offline.

Any sample is a pure function of (config, seed, split, index): it can be made alone, in any order, on any
worker. Whether a web text is true travels in the json (`truth`) for evaluation only; nothing that trains or
filters may read it.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import Field, field_validator

from capfilt.config import Config
from capfilt.data import shards
from capfilt.data.sample import Sample
from capfilt.data.synthetic import world_texts
from capfilt.data.synthetic.world_texts import HELD_OUT, Scene, Thing, captions, pick, vocabulary
from capfilt.errors import DataError, did_you_mean
from capfilt.storage.paths import StoragePath

__all__ = ["HELD_OUT", "KINDS", "SPLITS", "Scene", "Thing", "WorldConfig"]
__all__ += ["captions", "count", "paint", "sample", "scene", "vocabulary", "write"]

Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]

SPLITS = ("web", "human", "val", "test")
KINDS = ("other", "boilerplate", "seo", "truncated", "attribute")
_SEEN = tuple(look for look in world_texts.LOOKS if look not in HELD_OUT)
_UNSEEN = tuple(sorted(HELD_OUT))

# sRGB; the eight stay apart from each other and from the four backgrounds through jitter and JPEG.
_PAINTS = {
    "red": (222, 24, 32),
    "yellow": (250, 230, 40),
    "green": (20, 165, 55),
    "blue": (60, 105, 255),
    "purple": (165, 50, 205),
    "white": (250, 250, 250),
}
_GROUNDS = {"gray": (72, 72, 72), "black": (14, 14, 16), "brown": (74, 46, 26), "navy": (20, 26, 66)}
_DIAMETERS = {"large": 0.46, "small": 0.32}  # of the side
_WANDER = 0.02  # how far a thing strays from the middle of its cell, of the side
_SUPERSAMPLING = 4
_SHADE = 0.3  # what is left of a colour under a stripe or dot: dark, yet not the black of a background


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
    """What picture `index` of `split` shows: at least one held-out look in test, none in the other splits."""
    _check_split(split)
    rng = _stream(seed, split, index, "scene")
    weights = np.cumsum(config.objects)
    number = 1 + int(np.searchsorted(weights, rng.random() * weights[-1], side="right"))
    looks = [pick(rng, _UNSEEN if split == "test" else _SEEN)]
    while len(looks) < number:
        look = pick(rng, world_texts.LOOKS if split == "test" else _SEEN)
        if all(look[:2] != other[:2] for other in looks):
            looks.append(look)
    return Scene(_place(looks, rng), pick(rng, world_texts.BACKGROUNDS))


def _place(looks: list[world_texts.Look], rng: np.random.Generator) -> tuple[Thing, ...]:
    """Each look becomes a thing in its own cell of a 2 x 2 grid, a little off its middle.

    Shapes stay near the patches of a small vision transformer: wandering freely, they take it minutes more to learn.
    """
    cells = rng.permutation(4)
    things = []
    for (colour, shape, size, texture), cell in zip(looks, cells, strict=False):
        radius = _DIAMETERS[size] / 2 * rng.uniform(0.95, 1.05)
        dx, dy = rng.uniform(-_WANDER, _WANDER, 2)
        x, y = 0.25 + 0.5 * (cell % 2) + dx, 0.25 + 0.5 * (cell // 2) + dy
        things.append(Thing(shape, colour, size, texture, float(x), float(y), float(radius)))
    return tuple(things)


def _cross(u: Floats, v: Floats) -> Mask:
    a, b = np.abs(u), np.abs(v)
    inside: Mask = (np.minimum(a, b) < 0.32) & (np.maximum(a, b) < 0.95)
    return inside


# Inside or not, for coordinates in radii (u to the right, v downwards); tilted, each stays within one radius
# to the right and left, up and down.
_OUTLINES: dict[str, Callable[[Floats, Floats], Mask]] = {
    "circle": lambda u, v: u * u + v * v < 1,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) < 0.88,
    "triangle": lambda u, v: (v < 0.8) & (v > 1.9 * np.abs(u) - 0.95),
    "cross": _cross,
    "ring": lambda u, v: np.abs(u * u + v * v - 0.65) < 0.35,
}


def paint(scene: Scene, side: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """`scene` as uint8 [side, side, 3]: anti-aliased, tinted, a little uneven in light, with sensor noise."""
    ground = np.asarray(_GROUNDS[scene.background], np.float32) + rng.normal(0, 5, 3).astype(np.float32)
    canvas = np.empty((side, side, 3), np.float32)
    canvas[:] = ground
    for thing in scene.things:
        _paint_thing(canvas, thing, rng)
    slope = np.linspace(-1, 1, side, dtype=np.float32)
    across, down = rng.uniform(-0.06, 0.06, 2).astype(np.float32)
    canvas *= (1 + across * slope[None, :] + down * slope[:, None])[..., None]
    canvas += rng.standard_normal(canvas.shape, np.float32) * np.float32(rng.uniform(2, 6))
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def _paint_thing(canvas: Floats, thing: Thing, rng: np.random.Generator) -> None:
    side = len(canvas)
    x, y, radius = thing.x * side, thing.y * side, thing.radius * side
    x0, x1 = max(0, int(x - radius)), min(side, int(np.ceil(x + radius)))
    y0, y1 = max(0, int(y - radius)), min(side, int(np.ceil(y + radius)))
    dx, dy = _ticks(x0 - x, x1 - x0)[None, :], _ticks(y0 - y, y1 - y0)[:, None]
    tilt = rng.uniform(-0.1, 0.1)  # radians
    cos, sin = np.float32(np.cos(tilt)), np.float32(np.sin(tilt))
    cos, sin = cos / np.float32(radius), sin / np.float32(radius)
    inside = _OUTLINES[thing.shape](cos * dx + sin * dy, cos * dy - sin * dx)
    tint = (np.asarray(_PAINTS[thing.colour], np.float32) + rng.normal(0, 7, 3)).astype(np.float32)
    lit = inside.astype(np.float32)
    if thing.texture != "solid":
        marks = _marks(thing.texture, dx, dy, max(4.0, side * 0.1), rng)
        lit *= np.where(marks, np.float32(_SHADE), np.float32(1))
    area, light = _shrink(inside.astype(np.float32)), _shrink(lit)
    patch = canvas[y0:y1, x0:x1]
    patch *= 1 - area
    patch += tint * light


def _ticks(start: float, pixels: int) -> Floats:
    """The middles of the fine pixels of `pixels` whole ones, the first of which begins at `start`."""
    fine = np.arange(pixels * _SUPERSAMPLING, dtype=np.float32) + np.float32(0.5)
    return fine / np.float32(_SUPERSAMPLING) + np.float32(start)


def _shrink(plane: Floats) -> Floats:
    """Means over whole pixels: [fine h, fine w] to [h, w, 1]."""
    h, w = (n // _SUPERSAMPLING for n in plane.shape)
    means: Floats = plane.reshape(h, _SUPERSAMPLING, w, _SUPERSAMPLING).mean((1, 3))
    return means[..., None]


def _marks(texture: str, dx: Floats, dy: Floats, period: float, rng: np.random.Generator) -> Mask:
    """The dark part of a texture; dx [1, w] and dy [h, 1] in pixels from the middle, `period` in pixels."""
    angle, phase = rng.uniform(0, np.pi), rng.random()
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    striped: Mask = np.mod((cos * dx + sin * dy) / period + phase, 1) < 0.45
    return striped


def _encode(pixels: npt.NDArray[np.uint8], rng: np.random.Generator) -> tuple[bytes, str]:
    buffer, image = io.BytesIO(), Image.fromarray(pixels)
    if rng.random() < 0.5:
        image.save(buffer, "PNG", compress_level=1)
        return buffer.getvalue(), "png"
    # No chroma subsampling: halving the colour of a 13-pixel object is not the noise this world is about.
    image.save(buffer, "JPEG", quality=int(rng.integers(85, 96)), subsampling=0)
    return buffer.getvalue(), "jpg"


def _web_text(config: WorldConfig, seed: int, split: str, index: int, shown: Scene) -> tuple[str, str]:
    """A web text of `shown` and its kind: "right" or one of KINDS."""
    rng = _stream(seed, split, index, "text")
    if rng.random() >= config.noise:
        return world_texts.right(shown, rng), "right"
    ways: dict[str, Callable[[], str]] = {
        "other": lambda: world_texts.other(shown, rng, lambda i: scene(config, seed, split, i)),
        "boilerplate": lambda: world_texts.boilerplate(rng),
        "seo": lambda: world_texts.seo(shown, rng),
        "truncated": lambda: world_texts.truncated(shown, rng),
        "attribute": lambda: world_texts.attribute(shown, rng),
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
    image, extension = _encode(paint(shown, config.image_size, rng), rng)
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
    meta["caption"] = text
    return Sample(key=key, image=image, extension=extension, text=text, meta=meta)


def write(config: WorldConfig, seed: int, folder: StoragePath, split: str) -> list[StoragePath]:
    """Write `split` as folder/split/00000.tar ... with sizes.json, and return the tars in order.

    DataError if folder/split holds tars that this split would not overwrite: they would be read with it.
    """
    total, step = count(config, split), config.shard_size
    home = folder / split
    paths = [home / f"{number:05d}.tar" for number in range(-(-total // step))]
    there: set[StoragePath] = {*home.glob("*.tar")}
    strangers = sorted(path.name for path in there - {*paths})
    if strangers:
        raise DataError(f"{home} already holds {strangers[0]}, not part of this world: use an empty folder.")
    home.mkdir(parents=True, exist_ok=True)
    counts = {}
    for number, path in enumerate(paths):
        indices = range(number * step, min(total, (number + 1) * step))
        counts[path.name] = shards.write(path, (sample(config, seed, split, index) for index in indices))
    shards.write_sizes(home, counts)
    return paths
