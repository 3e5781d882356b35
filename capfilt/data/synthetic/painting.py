"""Scenes of the embedded world as small pictures: anti-aliased, a little uneven in light and colour, encoded."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image

from capfilt.data.synthetic.scenes import Scene, Thing

Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]

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
_SUPERSAMPLING = 4
_SHADE = 0.3  # what is left of a colour under a stripe or dot: dark, yet not the black of a background


# Inside or not, for coordinates in radii (u to the right, v downwards); tilted, each stays within one radius
# to the right and left, up and down.
_OUTLINES: dict[str, Callable[[Floats, Floats], Mask]] = {
    "circle": lambda u, v: u * u + v * v < 1,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) < 0.88,
    "triangle": lambda u, v: (v < 0.8) & (v > 1.9 * np.abs(u) - 0.95),
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) < 0.32) & (np.maximum(abs(u), abs(v)) < 0.95),
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
        marks = _marks(dx, dy, max(4.0, side * 0.1), rng)
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


def _marks(dx: Floats, dy: Floats, period: float, rng: np.random.Generator) -> Mask:
    """The dark part of a texture; dx [1, w] and dy [h, 1] in pixels from the middle, `period` in pixels."""
    angle, phase = rng.uniform(0, np.pi), rng.random()
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    striped: Mask = np.mod((cos * dx + sin * dy) / period + phase, 1) < 0.45
    return striped


def encode(pixels: npt.NDArray[np.uint8], rng: np.random.Generator) -> tuple[bytes, str]:
    """Encode uint8 [side, side, 3] as PNG or JPEG, drawn evenly; returns the bytes and the extension."""
    buffer, image = io.BytesIO(), Image.fromarray(pixels)
    if rng.random() < 0.5:
        image.save(buffer, "PNG", compress_level=1)
        return buffer.getvalue(), "png"
    # No chroma subsampling: halving the colour of a 13-pixel object is not the noise this world is about.
    image.save(buffer, "JPEG", quality=int(rng.integers(85, 96)), subsampling=0)
    return buffer.getvalue(), "jpg"
