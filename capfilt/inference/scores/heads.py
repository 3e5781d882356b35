"""Heads on CLIP's vectors of images: aesthetic, NSFW and watermark scores, from `.safetensors` in the public layouts.

A file of weights does not say where its activations are: the public heads of LAION have dropouts, and some of them no
ReLU, between their layers, which only the numbers of the layers tell apart. So a layout that is not known is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors

from capfilt.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from capfilt.data.images.preprocess import ImageFormat
    from capfilt.inference.local_model import LocalModel
    from capfilt.inference.scores.interface import ScoredImages, Values

_SEQUENTIAL: Mapping[tuple[int, ...], frozenset[int]] = {
    (0, 2, 4, 6, 7): frozenset(),
    (0, 3, 6, 9, 11): frozenset({0, 3, 6, 9}),
    (0, 3, 6, 9, 12, 15, 16): frozenset({0, 3, 6, 9, 12}),
}
"""By the numbers of the linear layers of a `layers.N`, those that a ReLU follows: LAION's aesthetic predictor v2
(sac+logos+ava1-l14-linearMSE), its ReLU variant, and LAION's NSFW detector of H/14."""
_LAYOUTS = (
    "weight, bias (one linear layer: LAION's aesthetic v1); layers.N.* as LAION's aesthetic v2 or its NSFW detector of"
    " H/14; norm.mean, norm.variance, linear_1.* to linear_4.* (LAION's NSFW detector of L/14)"
)


@dataclass(frozen=True)
class HeadLayout:
    """How the tensors of a file make a head."""

    layers: tuple[str, ...]
    """The names of its linear layers before `weight` and `bias`, in order."""
    active: frozenset[str]
    """Those that a ReLU follows."""
    normed: bool = False
    """Whether vectors are shifted by `norm.mean` and divided by the root of `norm.variance` first."""
    sigmoid: bool = False
    """Whether the last output is squashed into (0, 1)."""

    @property
    def names(self) -> list[str]:
        norm = ["norm.mean", "norm.variance"] if self.normed else []
        return [*norm, *(f"{layer}{part}" for layer in self.layers for part in ("weight", "bias"))]


def read_layout(file: Path, width: int, model: object) -> HeadLayout:
    """The layout of a head for vectors of this width, those of `model`, from the names and shapes in its file.

    Raises:
        ModelError: no safetensors, tensors of no known layout, or of shapes that do not fit each other or the model.
    """
    try:
        with safetensors.safe_open(file, framework="np") as opened:
            shapes = {name: list(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
            squashed = (opened.metadata() or {}).get("output") == "sigmoid"
    except (OSError, safetensors.SafetensorError) as error:
        raise ModelError(f"{file} is no head in safetensors ({error})") from None
    layout = _layout_of(shapes, squashed)
    if layout is None or (odd := sorted(shapes.keys() ^ set(layout.names))):
        what = f"has {', '.join(sorted(shapes)[:8])}" if layout is None else f"lacks or does not use {odd[0]}"
        raise ModelError(f"{file} {what}; a head has {_LAYOUTS}")
    expected = width
    for layer in layout.layers:
        outputs = shapes[f"{layer}weight"][0]
        if shapes[f"{layer}weight"] != [outputs, expected] or shapes[f"{layer}bias"] != [outputs]:
            whose = f"the vectors of {model} have {width}" if expected == width else "the layer before it gives others"
            raise ModelError(f"{file}: {layer}weight is of {shapes[f'{layer}weight']}, and {whose}")
        expected = outputs
    if expected != 1 or (layout.normed and any(shapes[f"norm.{name}"] != [width] for name in ("mean", "variance"))):
        raise ModelError(f"{file}: a head gives one number for a vector of {width}; this one gives {expected}")
    return layout


def _layout_of(shapes: Mapping[str, Sequence[int]], squashed: bool) -> HeadLayout | None:
    """The layout that tensors of these names have; None for an unknown one."""
    if shapes.keys() == {"weight", "bias"}:
        return HeadLayout(("",), frozenset(), sigmoid=squashed)
    if "norm.mean" in shapes:
        layers = tuple(f"linear_{number}." for number in range(1, 5))
        return HeadLayout(layers, frozenset(layers[:-1]), normed=True, sigmoid=True)
    numbers = tuple(
        sorted(int(match[1]) for name in shapes if (match := re.fullmatch(r"layers\.(\d{1,3})\.weight", name)))
    )
    if numbers not in _SEQUENTIAL:
        return None
    active = frozenset(f"layers.{number}." for number in _SEQUENTIAL[numbers])
    return HeadLayout(tuple(f"layers.{number}." for number in numbers), active, sigmoid=squashed)


class HeadScorer:
    """Scores images by a head on unit vectors of a dual encoder; all texts of an image have the score of the image."""

    def __init__(self, local: LocalModel, file: Path, bounds: tuple[float, float] | None):
        """`bounds`: what the head's output is cut to: a detector that was fitted to 0 and 1 goes a little beyond."""
        import torch

        self.local, self.bounds = local, bounds
        self.layout = read_layout(file, local.model.config.feature_width, "the model")
        with safetensors.safe_open(file, framework="pt") as opened:
            self.tensors: dict[str, Tensor] = {
                name: opened.get_tensor(name).to(local.device, torch.float32) for name in self.layout.names
            }

    @property
    def image_formats(self) -> tuple[ImageFormat, ...]:
        return (self.local.image_format,)

    def score(self, batch: ScoredImages) -> Values:
        """The head's number of each image, once for each of its rows."""
        import torch

        with torch.inference_mode():
            vectors = self.local.model.project_image(self.local.image_tokens(batch.images)).float()
            with torch.autocast(self.local.device.type, enabled=False):  # a head is small, and was fitted in fp32
                numbers = self.apply(vectors).tolist()
        return [[number] * len(rows) for rows, number in zip(batch.rows, numbers, strict=True)]

    def apply(self, vectors_BP: Tensor) -> Tensor:
        """Unit vectors of images -> a number for each [B]."""
        import torch

        x = vectors_BP
        if self.layout.normed:
            x = (x - self.tensors["norm.mean"]) / self.tensors["norm.variance"].sqrt()
        for layer in self.layout.layers:
            x = torch.nn.functional.linear(x, self.tensors[f"{layer}weight"], self.tensors[f"{layer}bias"])
            x = x.relu() if layer in self.layout.active else x
        x = (x.sigmoid() if self.layout.sigmoid else x)[:, 0]
        return x if self.bounds is None else x.clamp(*self.bounds)
