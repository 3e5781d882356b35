"""Models on disk: our folder with `architecture.yaml` and `model.safetensors`, transformers' folder, BLIP's `.pth`.

Nothing is repaired silently: every key of a file is used, left behind for a reason that is written down, or refused by
name. How the outside files name things is in `layouts.py`; what to begin a pretraining from is in `initial.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from torch import Tensor, nn

from capfilt import config as configs
from capfilt.errors import ModelError
from capfilt.models import files, hf, layouts
from capfilt.models.blip import Blip, BlipConfig
from capfilt.models.files import Tensors
from capfilt.models.initial import initialise as initialise  # one door to weights
from capfilt.models.vision import resize_positions
from capfilt.reports.ledger import atomic, sha256_file, write_json

ARCHITECTURE, WEIGHTS, MOMENTUM = "architecture.yaml", files.SAFE, "momentum.safetensors"
READABLE = f"a folder with {ARCHITECTURE} or the home of a training, a folder of transformers, a .pth of BLIP"

Layout = Literal["capfilt", "hf", "pth"]


def find(name: str) -> Path:
    """Where a model lies, in full: a folder, a file, or what the Hugging Face hub has under that name, fetched.

    Raises:
        ModelError: nothing that can be read as a model, here or there.
    """
    path = Path(name).absolute()
    if path.exists():
        for candidate in (path, path / "checkpoint"):
            if layout(candidate) is not None:
                return candidate
        raise ModelError(f"{name} is no model; what can be read: {READABLE}, a name on the Hugging Face hub")
    return files.download(name)


def layout(path: Path) -> Layout | None:
    """Which kind of model lies there; None for anything else."""
    if path.is_file():
        return "pth" if path.suffix in files.PICKLES else None
    if (path / ARCHITECTURE).is_file():
        return "capfilt"
    return "hf" if (path / hf.CONFIG).is_file() else None


def architecture(path: Path) -> BlipConfig:
    """The architecture of a saved model. Of the tensors only those are looked at that say what is tied."""
    match layout(path):
        case "capfilt":
            return configs.read(path / ARCHITECTURE, BlipConfig)
        case "hf":
            return _read_hf(path, only={layouts.OUTPUT, layouts.STACKS["decoder"] + layouts.WORDS})[0]
        case "pth":
            return _read_pth(path)[0]
    raise ModelError(f"{path} holds no model; what can be read: {READABLE}")


def load(path: Path, **changes: object) -> Blip:
    """Read a model. `changes` are fields of the architecture to set otherwise: roles, image_size, itm_token, dropout.

    Tensors that the changed architecture does not have (the encoder's, for a captioner) are left behind on purpose;
    everything that it has must be in the file. Positions are interpolated when the picture size changed.

    Raises:
        ModelError: no model there, or keys that are missing, unexpected or of another shape.
    """
    own, tensors = read(path)
    model = blank(_changed(own, changes))
    if "vision.positions" in tensors:
        size, patch = model.config.vision.image_size, model.config.vision.patch_size
        tensors["vision.positions"] = resize_positions(tensors["vision.positions"], size, patch)
    model.to_empty(device="cpu")
    fill(model, tensors, path)
    return model


def read(path: Path) -> tuple[BlipConfig, Tensors]:
    """A model's architecture and its tensors by our names, every key of its file accounted for."""
    match layout(path):
        case "hf":
            config, found = _read_hf(path)
            tensors = layouts.take(found, layouts.names(config, "hf"), path)
            if "encoder" in config.text.roles and not config.answers:  # the file has no place for it
                tensors["temperature"] = torch.tensor(config.temperature)
            return config, tensors
        case "pth":
            config, found = _read_pth(path)
            return config, layouts.take(found, layouts.names(config, "pth"), path)
    config = architecture(path)
    own = layouts.once((name, name) for name in blank(config).state_dict())
    return config, layouts.take(files.tensors(path / WEIGHTS), own, path / WEIGHTS)


def read_momentum(path: Path, config: BlipConfig) -> Tensors:
    """What a training kept beside its model, for a copy of architecture `config`: the momentum encoders by our names,
    and `queue_image` and `queue_text`, [size, projection] each. BLIP's pretrained `.pth` has them too.

    Raises:
        ModelError: nothing was kept there, or it does not fit.
    """
    if layout(path) == "pth":
        kept = layouts.take_momentum(files.tensors(path), config, path)
    elif (path / MOMENTUM).is_file():
        kept = {name.removeprefix("model."): t for name, t in files.tensors(path / MOMENTUM).items()}
        kept.pop("pointer", None)
    else:
        raise ModelError(
            f"{path} has no momentum copy beside the model; train it with keep_momentum, or begin with "
            f"objectives.momentum_from=model"
        )
    if "vision.positions" in kept:
        kept["vision.positions"] = resize_positions(
            kept["vision.positions"], config.vision.image_size, config.vision.patch_size
        )
    return kept


def blank(config: BlipConfig) -> Blip:
    """A model without weights, on the meta device: its names and shapes."""
    with torch.device("meta"):
        return Blip(config)


def fill(module: nn.Module, tensors: Mapping[str, Tensor], source: object) -> None:
    """Copy tensors into a module that may need fewer of them, or say exactly what does not fit."""
    wanted = module.state_dict()
    missing = sorted(wanted.keys() - tensors.keys())
    misshapen = sorted(
        f"{name} {list(tensors[name].shape)} for {list(wanted[name].shape)}"
        for name in wanted.keys() & tensors.keys()
        if wanted[name].shape != tensors[name].shape
    )
    layouts.refuse(source, [("missing", missing), ("of another shape", misshapen)])
    module.load_state_dict({name: tensors[name] for name in wanted})


def fingerprint(path: Path) -> str:
    """Which model this is: the family and the sha256 of its weights."""
    file = files.weights_file(path)
    if file is None:
        raise ModelError(f"no weights at {path}; a model has {WEIGHTS} there")
    return f"{architecture(path).family}-{sha256_file(file)}"


def left_behind(path: Path) -> dict[str, int]:
    """How many keys of a model's file are left behind on purpose, by the reason."""
    file = files.weights_file(path)
    reasons = [layouts.why_ignored(name) for name in (files.tensors(file) if file else ())]
    return {why: reasons.count(why) for why in layouts.IGNORED.values() if why in reasons}


def save(model: Blip, folder: Path) -> None:
    """Write a model; the weights file appears only when it is whole, and last."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / ARCHITECTURE) as file:
        file.write(configs.to_yaml(model.config).encode())
    with atomic(folder / WEIGHTS) as file:
        file.write(safetensors.torch.save(_tensors(model)))


def save_hf(model: Blip, folder: Path, special: Mapping[str, int]) -> None:
    """Write a captioner, a filter or a model that answers as `from_pretrained` of transformers reads it.

    `special` are the ids of "pad" and "sep". ModelError for a model of both roles: transformers has no class for it.
    """
    own = _tensors(model)
    temperature = own.pop("temperature", torch.tensor(model.config.temperature))
    described = hf.describe(model.config, float(temperature), special)
    # safetensors refuses one storage under two names.
    tensors = {name: tensor.clone() for name, tensor in layouts.give(own, model.config, "hf").items()}
    write_json(folder / hf.CONFIG, described)
    with atomic(folder / WEIGHTS) as file:
        file.write(safetensors.torch.save(tensors, metadata={"format": "pt"}))


def save_pth(model: Blip, path: Path) -> None:
    """Write a model under the names of BLIP's own code, and beside it in a YAML what such a file does not say."""
    with atomic(path.with_suffix(".yaml")) as file:
        file.write(configs.to_yaml(model.config).encode())
    with atomic(path) as file:
        torch.save({"model": layouts.give(_tensors(model), model.config, "pth")}, file)


def _tensors(model: Blip) -> Tensors:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def _read_hf(folder: Path, only: set[str] | None = None) -> tuple[BlipConfig, Tensors]:
    config, file = hf.read(folder), files.weights_file(folder)
    if file is None:
        raise ModelError(f"{folder} has {hf.CONFIG} and no weights; it needs {files.SAFE} or {files.BIN}")
    tensors = files.tensors(file, lambda name: only is None or name in only)
    here = layouts.OUTPUT in tensors
    tied = layouts.settle_head(tensors) and (here or hf.declares_tied(config))
    return hf.architecture(config, tied, folder), tensors


def _read_pth(path: Path) -> tuple[BlipConfig, Tensors]:
    tensors = files.tensors(path)
    tied = layouts.settle_head(tensors)
    beside = path.with_suffix(".yaml")
    if not beside.is_file():
        return layouts.from_shapes(tensors, path), tensors
    return _changed(configs.read(beside, BlipConfig), {"tie_lm_head": tied}), tensors


def _changed(config: BlipConfig, changes: Mapping[str, object]) -> BlipConfig:
    text = {k: v for k, v in changes.items() if k in type(config.text).model_fields}
    vision = {k: v for k, v in changes.items() if k in type(config.vision).model_fields}
    own = {k: v for k, v in changes.items() if k == "itm_token"}
    unknown = changes.keys() - text.keys() - vision.keys() - own.keys()
    assert not unknown, f"no such part of an architecture: {unknown}"
    return config.model_copy(
        update={
            "text": config.text.model_copy(update=text),
            "vision": config.vision.model_copy(update=vision),
            **own,
        }
    )
