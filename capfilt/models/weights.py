"""Models on disk: a folder with `architecture.yaml` and `model.safetensors`.

Nothing is repaired silently: every missing, unexpected or misshapen key is named. Nothing is unpickled.
"""

from __future__ import annotations

from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor, nn

from capfilt import config as configs
from capfilt.errors import ModelError
from capfilt.models.blip import Blip, BlipConfig
from capfilt.models.vision import resize_positions
from capfilt.reports.ledger import atomic, sha256_file

ARCHITECTURE, WEIGHTS = "architecture.yaml", "model.safetensors"


def save(model: Blip, folder: Path) -> None:
    """Write a model; the weights file appears only when it is whole, and last."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / ARCHITECTURE) as file:
        file.write(configs.to_yaml(model.config).encode())
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with atomic(folder / WEIGHTS) as file:
        file.write(safetensors.torch.save(tensors))


def architecture(folder: Path) -> BlipConfig:
    """The architecture of a saved model."""
    path = folder / ARCHITECTURE
    if not path.is_file():
        raise ModelError(f"{folder} holds no {ARCHITECTURE}; a model folder has {ARCHITECTURE} and {WEIGHTS}")
    return configs.read(path, BlipConfig)


def load(folder: Path, **changes: object) -> Blip:
    """Read a model. `changes` are sections of the architecture to set otherwise, such as roles or picture size.

    Keys that the changed architecture does not have (the encoder's, for a captioner) are left behind on purpose; everything that it has
    must be in the file. Positions are interpolated when the picture size changed.
    """
    config = _changed(architecture(folder), changes)
    model = Blip(config)
    tensors = read_tensors(folder / WEIGHTS)
    positions = tensors.get("vision.positions")
    if positions is not None:
        tensors["vision.positions"] = resize_positions(
            positions, config.vision.image_size, config.vision.patch_size
        )
    fill(model, tensors, allow_unused=bool(changes), source=folder / WEIGHTS)
    return model


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise ModelError(f"no weights at {path}") from None
    except safetensors.SafetensorError as error:
        raise ModelError(f"{path} is not a whole safetensors file: {error}") from None


def fill(module: nn.Module, tensors: dict[str, Tensor], allow_unused: bool, source: object) -> None:
    """Copy tensors into a module, or say exactly what does not fit."""
    wanted = module.state_dict()
    missing = sorted(wanted.keys() - tensors.keys())
    unused = [] if allow_unused else sorted(tensors.keys() - wanted.keys())
    misshapen = sorted(k for k in wanted.keys() & tensors.keys() if wanted[k].shape != tensors[k].shape)
    faults = [("missing", missing), ("unexpected", unused), ("of another shape", misshapen)]
    told = "; ".join(f"{len(keys)} {kind}: {', '.join(keys[:5])}" for kind, keys in faults if keys)
    if told:
        raise ModelError(f"{source} does not fit the architecture: {told}")
    module.load_state_dict({name: tensors[name] for name in wanted})


def fingerprint(folder: Path) -> str:
    """Which model this is: the family and the sha256 of its weights."""
    return f"{architecture(folder).family}-{sha256_file(folder / WEIGHTS)}"


def _changed(config: BlipConfig, changes: dict[str, object]) -> BlipConfig:
    text = {k: v for k, v in changes.items() if k in type(config.text).model_fields}
    vision = {k: v for k, v in changes.items() if k in type(config.vision).model_fields}
    unknown = changes.keys() - text.keys() - vision.keys()
    assert not unknown, f"no such part of an architecture: {unknown}"
    return config.model_copy(
        update={
            "text": config.text.model_copy(update=text),
            "vision": config.vision.model_copy(update=vision),
        }
    )
