"""Folders of open_clip: `open_clip_config.json` beside weights in one of two forms, and often transformers' files too.

open_clip names such a folder `local-dir:FOLDER`, and one on the Hugging Face hub `hf-hub:OWNER/NAME`; here a prefix
says that open_clip's files are meant where transformers' lie beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capfilt.errors import ModelError
from capfilt.models.checkpoints import files
from capfilt.storage import safe_paths
from capfilt.storage.atomic import atomic, write_json
from capfilt.storage.documents import read_model_object
from capfilt.storage.paths import StoragePath

if TYPE_CHECKING:
    from capfilt.models.checkpoints.files import Tensors
    from capfilt.models.layers.config import TextStackConfig, VisionConfig

PREFIXES = ("hf-hub:", "local-dir:")


def find(name: str) -> Path:
    """The file of weights in the folder that a name with a prefix names, fetched if it is of the hub. ModelError."""
    prefix, _, place = name.partition(":")
    folder = files.download(place, open_clip=True) if f"{prefix}:" == PREFIXES[0] else Path(place).absolute()
    weights = weights_of(folder)
    safe_paths.check_model(folder)
    return weights


def is_model(path: StoragePath) -> bool:
    """Whether a folder is open_clip's, and not transformers' too; or a file is the weights of such a folder."""
    if path.is_file():
        return path.name in files.OPEN_CLIP_WEIGHTS and (path.parent / files.OPEN_CLIP).is_file()
    others = (path / name for name in files.OTHER_WEIGHTS)
    return (path / files.OPEN_CLIP).is_file() and not any(other.is_file() for other in others)


def weights_of(path: Path) -> Path:
    """The file of weights of a folder, or the file itself; ModelError where there is none, or nothing describes it."""
    there = (path / name for name in files.OPEN_CLIP_WEIGHTS)
    weights = path if path.is_file() else next((one for one in there if one.is_file()), None)
    if weights is None or not (weights.parent / files.OPEN_CLIP).is_file():
        raise ModelError(
            f"{path} is no folder of open_clip: it needs {files.OPEN_CLIP} and {' or '.join(files.OPEN_CLIP_WEIGHTS)}"
        )
    return weights


def described(weights: Path) -> dict[str, Any]:
    """What describes the model of a file of weights; ModelError where it cannot be read."""
    path = weights.parent / files.OPEN_CLIP
    try:
        return dict(read_model_object(path))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error})") from None


def save(model_cfg: Mapping[str, Any], preprocess_cfg: Mapping[str, Any], tensors: Tensors, folder: Path) -> None:
    """Write a folder, its weights last."""
    import safetensors.torch

    write_json(folder / files.OPEN_CLIP, {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg})
    with atomic(folder / files.OPEN_CLIP_SAFE) as file:
        file.write(safetensors.torch.save(tensors, metadata={"format": "pt"}))


# ---- model_cfg: a ViT and a text stack of open_clip's own ----

_FIELDS = {
    "vision": {"image_size": "image_size", "patch_size": "patch_size", "width": "width", "depth": "layers"},
    "text": {"vocab_size": "vocab_size", "max_positions": "context_length", "heads": "heads", "width": "width",
             "depth": "layers"},
}  # fmt: skip
"""Fields of our towers -> theirs."""
_READ = {
    "embed_dim",
    "quick_gelu",
    "vision_cfg",
    "text_cfg",
    "init_logit_scale",
    "mlp_ratio",
    "head_width",
    "patch_dropout",
}
_USUAL = {"pool_type": ("tok", "argmax"), "pos_embed_type": ("learnable",)}


def towers(model_cfg: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The fields of our two towers that a `model_cfg` describes.

    Raises:
        ValueError: something is set that is not read here: a tower of timm or transformers, a ResNet, a decoder.
        LookupError, TypeError: no such description.
    """
    read: dict[str, dict[str, Any]] = {}
    _refuse_others(model_cfg, _READ)
    for tower, fields in _FIELDS.items():
        section = dict(model_cfg[f"{tower}_cfg"])
        _refuse_others(section, _READ | set(fields.values()))
        read[tower] = {ours: section[theirs] for ours, theirs in fields.items() if theirs in section}
        read[tower]["hidden"] = int(section["width"] * section.get("mlp_ratio", 4.0))
    read["vision"]["heads"] = model_cfg["vision_cfg"]["width"] // model_cfg["vision_cfg"].get("head_width", 64)
    return read


def sections(vision: VisionConfig, text: TextStackConfig) -> dict[str, dict[str, Any]]:
    """The `vision_cfg` and `text_cfg` of two towers."""
    written: dict[str, dict[str, Any]] = {}
    parts: dict[str, VisionConfig | TextStackConfig] = {"vision": vision, "text": text}
    for tower, part in parts.items():
        fields = _FIELDS[tower]
        section = {theirs: getattr(part, ours) for ours, theirs in fields.items()}
        written[f"{tower}_cfg"] = {**section, "mlp_ratio": part.hidden / part.width}
    written["vision_cfg"]["head_width"] = vision.width // vision.heads
    return written


def _refuse_others(part: Mapping[str, Any], known: set[str]) -> None:
    odd = [key for key, value in part.items() if key not in known and value and value not in _USUAL.get(key, ())]
    if odd or not isinstance(part.get("layers", 12), int):
        raise ValueError(f"{', '.join(odd) or 'layers'}: of open_clip, models of its plain ViT and text can be read")
