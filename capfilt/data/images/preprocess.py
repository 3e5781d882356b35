"""How pictures are prepared for a model: the rule of resizing, mean and standard deviation.

Pictures of a rule that leaves each its shape ("padded") have a fourth channel in a batch, 1 where there is a picture
and 0 where there is padding; all others have three.

A folder of transformers says so in `preprocessor_config.json`, or in `processor_config.json` under `image_processor`,
which comes first where both are there, as in transformers. A folder without either takes the default of its family;
BLIP's is squashed with the bicubic filter, CLIP's mean and standard deviation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from capfilt.config import Config, added
from capfilt.data.images import decode
from capfilt.errors import ImageError, ModelError
from capfilt.storage.atomic import write_json
from capfilt.storage.documents import read_model_object
from capfilt.storage.local_copies import local_copy
from capfilt.storage.paths import StoragePath, storage_path

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ALONE, NESTED, OPEN_CLIP = "preprocessor_config.json", "processor_config.json", "open_clip_config.json"
_WEIGHTS = (".pth", ".pt", ".ckpt", ".th", ".bin", ".safetensors")

_FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""Pillow's filters, by the number that it and transformers give them."""
_USUAL: dict[str, Any] = {
    "image_mean": decode.MEAN,
    "image_std": decode.STD,
    "resample": 3,
    "rescale_factor": 1 / 255,
}
# The processors of transformers whose defaults are known here; of others everything must be written down.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "Blip": {"size": None, "do_center_crop": False},
    "CLIP": {"size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": 224},
    "Vilt": {
        "size": {"shortest_edge": 384},
        "size_divisor": 32,
        "do_pad": True,
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
    },
}
_SUPPORTED = ("do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_convert_rgb")


class Preprocess(Config):
    """From an upright RGB picture to what a model reads. The defaults are BLIP's."""

    mean: tuple[float, float, float] = decode.MEAN
    std: tuple[float, float, float] = decode.STD
    divisor: float = Field(default=255.0, gt=0, allow_inf_nan=False)
    """What values of 0 to 255 are divided by, before the mean is taken off."""
    resample: Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"] = "bicubic"
    shape: Literal["squash", "shortest edge", "padded"] = "squash"
    """Whether a picture is squashed to a square, keeps its shape and loses what is outside the middle, or keeps all of
    itself and is padded on the right and below to the largest of its batch (ViLT)."""
    resized: int = Field(default=0, ge=0)
    """Side, or shortest side, after resizing; the middle of it is what the model reads. 0: that size itself."""
    longest: float = added(1333 / 800, ge=1)
    """Padded: the longer side at most, as a multiple of the shorter one."""
    multiple: int = added(32, ge=1)
    """Padded: both sides are rounded down to a multiple of this, the side of a patch."""

    @model_validator(mode="after")
    def _possible(self) -> Preprocess:
        if not all(map(math.isfinite, (*self.mean, *self.std))) or min(self.std) <= 0:
            raise ValueError(f"mean {self.mean} and std {self.std}: they must be finite, and std above 0")
        return self

    @classmethod
    def read(cls, model: StoragePath, size: int, default: Preprocess | None = None) -> Preprocess:
        """Read the settings in the folder of a model, or of a .pth, for pictures of `size` pixels.

        A folder of open_clip says it in `open_clip_config.json`. `default`: the family's, where the folder has none;
        None: BLIP's.

        Raises:
            ModelError: settings that cannot be done.
        """
        where = storage_path(model)
        folder = local_copy(where.parent if where.name.endswith(_WEIGHTS) else where)
        try:
            settings = _read_settings(Path(folder), size)
            return default or cls() if settings is None else _preprocess(settings, size)
        except (OSError, ValueError, TypeError, ArithmeticError) as error:  # pydantic's errors are ValueErrors
            why = " ".join(str(error).split())[:300]
            raise ModelError(f"{model}: how it wants its pictures ({ALONE}) cannot be done: {why}") from None

    def to_pixels(self, image: Image.Image, size: int) -> np.ndarray:
        """An RGB picture -> uint8 [size, size, 3]; padded ones [H, W, 3] of sides of their own. ImageError for
        one so long and thin that resizing it would make too many pixels."""
        side = self.resized or size
        if self.shape == "padded":
            return np.array(image.resize(self._sides(image, side), self._filter), dtype=np.uint8)
        width, height = side, side
        if self.shape == "shortest edge":
            short, long = min(image.size), side * max(image.size) // min(image.size)
            width, height = (side, long) if image.width == short else (long, side)
            if width * height > decode.MAX_PIXELS:
                raise ImageError(f"too many pixels ({width} x {height} when resized, limit {decode.MAX_PIXELS})")
        left, top = (width - size) // 2, (height - size) // 2
        resized = np.array(image.resize((width, height), self._filter), dtype=np.uint8)
        return resized[top : top + size, left : left + size]

    def crop_to_pixels(self, image: Image.Image, size: int) -> np.ndarray:
        """`to_pixels` of a random crop of a training picture: all of it stays, in a square where the rule makes one."""
        if self.shape == "padded":
            return self.to_pixels(image, size)
        return np.array(image.resize((size, size), self._filter), dtype=np.uint8)

    @property
    def _filter(self) -> Image.Resampling:
        return Image.Resampling(_FILTERS.index(self.resample))

    def _sides(self, image: Image.Image, size: int) -> tuple[int, int]:
        """Width and height of a padded picture, as ViLT's and transformers' code round them."""
        scale = size / min(image.size)
        sides = [size if side == min(image.size) else scale * side for side in image.size]
        if max(sides) > (most := int(self.longest * size)):
            shrink = most / max(sides)
            sides = [side * shrink for side in sides]
        width, height = (max(int(side + 0.5) // self.multiple, 1) * self.multiple for side in sides)
        return width, height

    def stack(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Pictures as `to_pixels` makes them -> one batch, uint8 [B, H, W, 3]; padded ones [B, H, W, 4], as tall and
        wide as the largest, the fourth channel 1 where there is a picture."""
        import torch

        if self.shape != "padded":
            return torch.from_numpy(np.stack(pictures))
        height, width = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
        batch = np.zeros((len(pictures), height, width, 4), np.uint8)
        for row, picture in zip(batch, pictures, strict=True):
            row[: picture.shape[0], : picture.shape[1], :3] = picture
            row[: picture.shape[0], : picture.shape[1], 3] = 1
        return torch.from_numpy(batch)

    def normalise(self, pixels_BHWC: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] as `stack` makes it -> what the model reads, float32 [B, 3, H, W]; of a padded batch
        [B, 4, H, W], zeros where there is padding. The same bits on every device."""
        import torch

        pixels_BCHW = pixels_BHWC.permute(0, 3, 1, 2).contiguous()  # before they are floats: a quarter of the bytes
        divisor, mean, std = _constants((self.divisor,), self.mean, self.std, device=pixels_BCHW.device)
        normal = pixels_BCHW[:, :3].float().div_(divisor).sub_(mean).div_(std)
        if pixels_BCHW.shape[1] == 3:
            return normal
        mask_B1HW = pixels_BCHW[:, 3:].float()
        return torch.cat([normal * mask_B1HW, mask_B1HW], dim=1)

    def to_transformers(self, size: int) -> dict[str, Any]:
        """The settings of a transformers image processor that does the same, for pictures of `size` pixels."""
        side, squash = self.resized or size, self.shape == "squash"
        own: dict[str, Any]
        if self.shape == "padded":
            own = {"image_processor_type": "ViltImageProcessor", "size": {"shortest_edge": side}, "do_pad": True}
            own["size_divisor"] = self.multiple
            if self.longest != type(self).model_fields["longest"].default:
                own["longest"] = self.longest  # transformers knows one ratio of sides alone; this is read here
        else:
            sides = {"height": side, "width": side} if squash else {"shortest_edge": side}
            own = {"image_processor_type": "BlipImageProcessor", "size": sides, "do_convert_rgb": True}
            if not squash or side != size:
                crop = {"do_center_crop": True, "crop_size": {"height": size, "width": size}}
                own |= {"image_processor_type": "CLIPImageProcessor", **crop}
        return {
            **own,
            "do_resize": True,
            "resample": _FILTERS.index(self.resample),
            "do_rescale": True,
            "rescale_factor": 1 / self.divisor,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    def to_open_clip(self, size: int) -> dict[str, Any]:
        """The `preprocess_cfg` of open_clip that does the same. ModelError where it has none."""
        if self.resized not in (0, size) or self.divisor != 255 or self.shape == "padded":
            raise ModelError(f"open_clip cannot prepare pictures so: resized {self.resized}, {self.shape}")
        mode = "squash" if self.shape == "squash" else "shortest"
        norms = {"mean": list(self.mean), "std": list(self.std)}
        return {"size": [size, size], "mode": "RGB", **norms, "interpolation": self.resample, "resize_mode": mode}

    def save(self, folder: StoragePath, size: int, default: Preprocess | None = None) -> None:
        """Write it into a model's folder, unless it is the default of its family (none: BLIP's)."""
        if self != (default or Preprocess()):
            write_json(folder / ALONE, self.to_transformers(size))


BLIP_PREPROCESS = Preprocess()
"""Squashed to a square with the bicubic filter, CLIP's mean and standard deviation."""
CLIP_PREPROCESS = Preprocess(shape="shortest edge")
"""The shortest side to the size with the bicubic filter, then the middle; CLIP's mean and standard deviation."""
VILT_PREPROCESS = Preprocess(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), shape="padded")
"""The shortest side to the size with the bicubic filter, the longer one at most 1333 / 800 of it; values in [-1, 1]."""


Resizing = tuple[int, int, str, str, float, int]
"""What decides the bytes of a resized picture: the size, the side that it is resized to and of which the square is the
middle, the filter, the shape; and of a padded picture `longest` and `multiple`, else zeros."""


@dataclass(frozen=True)
class ImageFormat:
    """The pictures that a model reads."""

    size: int
    """Side of the square, or shortest side of a padded picture, pixels."""
    preprocess: Preprocess = BLIP_PREPROCESS

    @property
    def resizing(self) -> Resizing:
        """Formats that agree on it share the bytes of a resized picture, whatever their mean."""
        rule = self.preprocess
        longest, multiple = (rule.longest, rule.multiple) if rule.shape == "padded" else (0.0, 0)
        return self.size, rule.resized or self.size, rule.resample, rule.shape, longest, multiple

    def to_pixels(self, image: Image.Image) -> np.ndarray:
        """An RGB picture -> uint8 [size, size, 3]. ImageError as `Preprocess.to_pixels` raises."""
        return self.preprocess.to_pixels(image, self.size)

    def crop_to_pixels(self, image: Image.Image) -> np.ndarray:
        """A random crop of a training picture -> uint8 [size, size, 3]."""
        return self.preprocess.crop_to_pixels(image, self.size)


@functools.lru_cache(maxsize=64)
def _constants(*constants: tuple[float, ...], device: torch.device) -> list[Tensor]:
    """Numbers for all channels or for each, [C, 1, 1] on a device: copied there once, for the host waits for the copy.
    Tensors and not numbers, by whose reciprocal a GPU would multiply."""
    import torch

    with torch.inference_mode(False):  # training may use them after an evaluation did
        return [torch.tensor(each, device=device).view(-1, 1, 1) for each in constants]


def _read_settings(folder: Path, size: int) -> dict[str, Any] | None:
    """The settings of a transformers image processor, or of open_clip as such ones; None where the folder has none."""
    if (folder / NESTED).is_file():
        nested = read_model_object(folder / NESTED).get("image_processor")
        if isinstance(nested, dict):
            return nested
    if (folder / ALONE).is_file() or not (folder / OPEN_CLIP).is_file():
        return read_model_object(folder / ALONE) if (folder / ALONE).is_file() else None
    given = read_model_object(folder / OPEN_CLIP).get("preprocess_cfg") or {}
    mode, filter_ = given.get("resize_mode", "shortest"), given.get("interpolation", "bicubic")
    if mode not in ("shortest", "squash") or filter_ not in ("bicubic", "bilinear"):
        raise ValueError(f"{OPEN_CLIP}: resize_mode {mode}, interpolation {filter_}; shortest or squash can be done, "
                         "with bicubic or bilinear")  # fmt: skip
    sides = {"shortest_edge": size} if mode == "shortest" else {"height": size, "width": size}
    named = {"image_mean": given.get("mean"), "image_std": given.get("std")}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "size": sides,
        "crop_size": size,
        "resample": _FILTERS.index(filter_),
        **{key: value for key, value in named.items() if value is not None},
    }


def _preprocess(settings: dict[str, Any], size: int) -> Preprocess:
    """Settings of transformers as a Preprocess; ValueError for those that cannot be done."""
    name = str(settings.get("image_processor_type") or settings.get("feature_extractor_type") or "Blip")
    family = next((family for family in _DEFAULTS if name.startswith(family)), None)
    if family is None and (
        missing := [key for key in ("size", "image_mean", "image_std", "resample") if key not in settings]
    ):
        raise ValueError(f"it is a {name}, whose own {', '.join(missing)} are not known here; write them down")
    settings = _USUAL | _DEFAULTS.get(family or "", {}) | settings
    supported = (*_SUPPORTED, "do_pad") if family == "Vilt" else _SUPPORTED
    if unknown := [key for key, value in settings.items() if key.startswith("do_") and key not in supported and value]:
        raise ValueError(f"{unknown[0]} is {settings[unknown[0]]!r}; what can be done: {', '.join(supported)}")
    if not settings.get("do_resize", True):
        raise ValueError("do_resize is false; pictures of any size do not fit into a batch")
    resample = settings["resample"]
    if not isinstance(resample, int) or not 0 <= resample < len(_FILTERS):
        raise ValueError(f"resample is {resample!r}; it is a number of Pillow's, 0 to {len(_FILTERS) - 1}")
    normalises = settings.get("do_normalize", True)
    divisor = round(1 / float(settings["rescale_factor"]), 9) if settings.get("do_rescale", True) else 1.0
    shape: Literal["squash", "shortest edge", "padded"]
    bounds: dict[str, Any] = {}
    if family == "Vilt":
        shape, resized = "padded", _shortest_edge(settings)
        bounds = {key: settings[name] for key, name in _BOUNDS.items() if name in settings}
    else:
        shape, resized = _shape_and_size(settings, size, square=family != "CLIP")
    return Preprocess(
        mean=settings["image_mean"] if normalises else (0.0, 0.0, 0.0),
        std=settings["image_std"] if normalises else (1.0, 1.0, 1.0),
        divisor=divisor,
        resample=_FILTERS[resample],
        shape=shape,
        resized=0 if resized == size else resized,
        **bounds,
    )


_BOUNDS = {"multiple": "size_divisor", "longest": "longest"}
"""What a padded picture's sides are bound by, and its name in a processor's settings."""


def _shortest_edge(settings: dict[str, Any]) -> int:
    """The shortest side of pictures that keep their shape. ValueError for another rule."""
    given = settings["size"]
    edge = given.get("shortest_edge") if isinstance(given, dict) else given
    if not isinstance(edge, int) or edge < 1 or not settings["do_pad"]:
        raise ValueError(
            f"size is {given!r}, do_pad {settings['do_pad']!r}; what can be done: shortest_edge, and do_pad"
        )
    return edge


def _shape_and_size(
    settings: dict[str, Any], size: int, square: bool
) -> tuple[Literal["squash", "shortest edge"], int]:
    """The rule by which a picture is resized, and to how many pixels.

    ValueError where the crop of it has not the `size` that the model reads.
    """
    given = settings["size"] if settings["size"] is not None else size
    if isinstance(given, int):
        given = {"height": given, "width": given} if square else {"shortest_edge": given}
    if not isinstance(given, dict) or not all(isinstance(side, int) and side > 0 for side in given.values()):
        raise ValueError(f"size is {given!r}; it is a number of pixels, or height and width, or shortest_edge")
    if given.keys() == {"height", "width"} and given["height"] == given["width"]:
        shape, resized = "squash", given["height"]
    elif given.keys() == {"shortest_edge"} and settings.get("do_center_crop"):
        shape, resized = "shortest edge", given["shortest_edge"]
    else:
        raise ValueError(f"size is {given!r}; what can be done: equal height and width, or shortest_edge and a crop")
    kept = resized
    if settings.get("do_center_crop"):
        crop = settings.get("crop_size", resized)
        sides = set(crop.values()) if isinstance(crop, dict) else {crop}
        kept = sides.pop() if len(sides) == 1 else 0
        if not isinstance(kept, int) or not 0 < kept <= resized:
            raise ValueError(f"crop_size is {crop!r}; it is square, and not above the {resized} px it is cut from")
    if kept != size:
        raise ValueError(f"it makes pictures of {kept} px, and the model reads {size} px")
    return ("squash" if shape == "squash" else "shortest edge"), resized
