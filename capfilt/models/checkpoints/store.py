"""Models on disk: our folder with `architecture.yaml` and `model.safetensors`, transformers' folder, BLIP's `.pth`.

Nothing is repaired silently: every key of a file is used, left behind for a reason that is written down, or refused by
name. How the outside files name things is in `layouts.py`; what to begin a pretraining from is in `initial.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn

from capfilt import config as configs
from capfilt.errors import ModelError
from capfilt.models import Architecture, Model, build, read_architecture
from capfilt.models.blip import key_maps, transformers_config
from capfilt.models.blip.model import Blip, BlipConfig
from capfilt.models.blip2 import transformers_config as transformers_config2
from capfilt.models.blip2.model import Blip2, Blip2Config
from capfilt.models.checkpoints import files
from capfilt.models.checkpoints.files import Tensors
from capfilt.models.layers.vit import resize_positions
from capfilt.runs.ledger import fingerprint as digest_of
from capfilt.storage import safe_paths
from capfilt.storage.atomic import atomic, sha256_file, write_json
from capfilt.storage.local_copies import local_copy
from capfilt.storage.paths import StoragePath, storage_path
from capfilt.storage.remote_path import RemotePath

ARCHITECTURE, WEIGHTS, MOMENTUM = "architecture.yaml", files.SAFE, "momentum.safetensors"
READABLE = f"a folder with {ARCHITECTURE} or the home of a training, a folder of transformers, a .pth of BLIP"

Layout = Literal["capfilt", "hf", "pth"]

_TELLING = {
    key_maps.OUTPUT,
    key_maps.STACKS["decoder"] + key_maps.WORDS,
    *(f"language_model.{name}" for name in ("lm_head.weight", "shared.weight", "model.decoder.embed_tokens.weight")),
}
"""Of transformers' files, the tensors that say what is tied."""


def find(name: str) -> StoragePath:
    """Where a model lies, in full: a folder, a file, a folder on a store, or what the Hugging Face hub has under that
    name, fetched.

    Raises:
        ModelError: nothing that can be read as a model, here or there.
    """
    path = storage_path(name).absolute()
    there = isinstance(path, RemotePath)
    if not there and not path.exists():
        return files.download(name)
    try:
        found = [candidate for candidate in (path, path / "checkpoint") if layout(candidate) is not None]
    except OSError as error:
        raise ModelError(f"{name} cannot be looked at ({error}); are the store's keys in the environment?") from error
    if not found:
        only = "on a store a model is a folder; " if there else ""
        raise ModelError(f"{name} is no model; {only}what can be read: {READABLE}, a name on the Hugging Face hub")
    if isinstance(found[0], Path):
        safe_paths.check_model(found[0])
    return found[0]


def layout(path: StoragePath) -> Layout | None:
    """Which kind of model lies there; None for anything else. A model on a store is a folder."""
    if path.is_file():
        return "pth" if isinstance(path, Path) and path.suffix in files.PICKLES else None
    if (path / ARCHITECTURE).is_file():
        return "capfilt"
    return "hf" if (path / transformers_config.CONFIG).is_file() else None


def architecture(path: StoragePath) -> Architecture:
    """The architecture of a saved model. Of the tensors only those are looked at that say what is tied."""
    path = local_copy(path)
    match layout(path):
        case "capfilt":
            return read_architecture(path / ARCHITECTURE)
        case "hf":
            return _read_hf(path, only=_TELLING)[0]
        case "pth":
            return _read_pth(path)[0]
    raise ModelError(f"{path} holds no model; what can be read: {READABLE}")


def load(path: StoragePath, computes_in: torch.dtype | None = None, **changes: object) -> Model:
    """Read a model. `changes` are fields of the architecture to set otherwise: roles, image_size, itm_token, dropout.

    Frozen towers that are kept in fp32, as those of BLIP-2 on the hub, are held in bf16 where the model is to compute
    in it (`computes_in`): they would go through it slowly, or be cast anew for every token that is written.

    Tensors that the changed architecture does not have (the encoder's, for a captioner) are left behind on purpose;
    everything that it has must be in the file. Positions are interpolated when the picture size changed.

    Raises:
        ModelError: no model there, or keys that are missing, unexpected or of another shape.
    """
    path = local_copy(path)
    own, tensors = read(path)
    if isinstance(own, Blip2Config) and own.frozen == "fp32" and computes_in == torch.bfloat16:
        own = own.model_copy(update={"frozen": "bf16"})
    model = blank(_changed(own, changes))
    if "vision.positions" in tensors:
        size, patch = model.config.vision.image_size, model.config.vision.patch_size
        tensors["vision.positions"] = resize_positions(tensors["vision.positions"], size, patch)
    refuse_misfit(model, tensors, path)
    model.to_empty(device="cpu")
    fill(model, tensors, path)
    return model


def load_extended(path: StoragePath, config: Blip2Config) -> Blip2:
    """A new model that goes on from a saved one: BLIP-2's second stage from its first.

    What only the new model has, the layer before the language model, starts fresh; what only the saved one has is left
    behind. A language model that the saved one lacks stays without weights, on the meta device, until it is put there.

    Raises:
        ModelError: no model there, or one that lacks more than that.
    """
    path, model = local_copy(path), blank(config)
    assert isinstance(model, Blip2)
    tensors = read(path)[1]
    speaks = any(name.startswith("language.") for name in tensors)
    nn.Module.to_empty(model, device="cpu", recurse=False)
    for name, part in model.named_children():
        if name != "language" or speaks:
            part.to_empty(device="cpu")
    if config.language is not None:
        model.language.tie()
        model.language_projection.reset_parameters()
    size, patch = config.vision.image_size, config.vision.patch_size
    if "vision.positions" in tensors:
        tensors["vision.positions"] = resize_positions(tensors["vision.positions"], size, patch)
    fresh = {n: t for n, t in model.state_dict().items() if n.startswith("language") and n not in tensors}
    fill(model, {**fresh, **tensors}, path)
    return model


def read(path: Path) -> tuple[Architecture, Tensors]:
    """A model's architecture and its tensors by our names, every key of its file accounted for."""
    match layout(path):
        case "hf":
            config, found = _read_hf(path)
            tensors = key_maps.take(found, _hf_names(config), path)
            compares = "encoder" in config.text.roles and not (isinstance(config, BlipConfig) and config.answers)
            if compares:  # the file has no place for it
                tensors["temperature"] = torch.tensor(config.temperature)
            return config, tensors
        case "pth":
            config, found = _read_pth(path)
            assert isinstance(config, BlipConfig)
            return config, key_maps.take(found, key_maps.names(config, "pth"), path)
    config, found = architecture(path), files.tensors(path / WEIGHTS)
    if (layers := config.vision.depth + config.text.depth) > len(found):
        raise ModelError(f"{path}: {ARCHITECTURE} describes {layers} layers, and {WEIGHTS} has {len(found)} tensors")
    own = key_maps.once((name, name) for name in own_names(blank(config)))
    return config, key_maps.take(found, own, path / WEIGHTS)


def read_momentum(path: StoragePath, config: BlipConfig) -> Tensors:
    """What a training kept beside its model, for a copy of architecture `config`: the momentum encoders by our names,
    and `queue_image` and `queue_text`, [size, projection] each. BLIP's pretrained `.pth` has them too.

    Raises:
        ModelError: nothing was kept there, or it does not fit.
    """
    path = local_copy(path)
    if layout(path) == "pth":
        kept = key_maps.take_momentum(files.tensors(path), config, path)
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


def blank(config: Architecture) -> Model:
    """A model without weights, on the meta device: its names and shapes."""
    with torch.device("meta"):
        return build(config)


def own_names(module: nn.Module) -> list[str]:
    """The names of a module's tensors, one each: the second names of tied ones left out."""
    second = module.tied() if isinstance(module, Blip2) else {}
    return [name for name in module.state_dict() if name not in second]


def fill(module: nn.Module, tensors: Mapping[str, Tensor], source: object) -> None:
    """Copy tensors into a module that may need fewer of them, or say exactly what does not fit."""
    refuse_misfit(module, tensors, source)
    second = module.tied() if isinstance(module, Blip2) else {}
    module.load_state_dict({name: tensors[second.get(name, name)] for name in module.state_dict()})


def refuse_misfit(module: nn.Module, tensors: Mapping[str, Tensor], source: object) -> None:
    """Say exactly which tensors do not fit a module, which may still be without weights (`blank`): what a file holds
    bounds what is allocated for it."""
    every = module.state_dict()
    wanted = {name: every[name] for name in own_names(module)}
    missing = sorted(wanted.keys() - tensors.keys())
    misshapen = sorted(
        f"{name} {list(tensors[name].shape)} for {list(wanted[name].shape)}"
        for name in wanted.keys() & tensors.keys()
        if wanted[name].shape != tensors[name].shape
    )
    key_maps.refuse(source, [("missing", missing), ("of another shape", misshapen)])


def fingerprint(path: StoragePath) -> str:
    """Which model this is: the family and the sha256 of its weights, and of the files that say how it cuts texts and
    wants its pictures: another mean is another model.

    Of our own folders that is no more than the weights where a `vocab.txt` is all that lies beside them: the training
    that left both has the vocabulary in its own fingerprint.
    """
    path = local_copy(path)
    file = files.weights_file(path)
    if file is None:
        raise ModelError(f"no weights at {path}; a model has {WEIGHTS} there")
    digests = [sha256_file(part) for part in files.parts(file)]
    folder = path if path.is_dir() else path.parent
    beside = [folder / name for name in files.BESIDE if (folder / name).is_file()]
    if layout(path) != "capfilt" or [one.name for one in beside] != [files.VOCABULARY]:
        digests += [f"{one.name} {sha256_file(one)}" for one in beside]
    return f"{architecture(path).family}-{digests[0] if len(digests) == 1 else digest_of(digests)}"


def left_behind(path: StoragePath) -> dict[str, int]:
    """How many keys of a model's file are left behind on purpose, by the reason."""
    file = files.weights_file(local_copy(path))
    reasons = [key_maps.why_ignored(name) for name in (files.tensors(file) if file else ())]
    return {why: reasons.count(why) for why in key_maps.IGNORED.values() if why in reasons}


def save(model: Model, folder: StoragePath, state: Mapping[str, Tensor] | None = None) -> None:
    """Write a model; the weights file appears only when it is whole, and last.

    `state` has its tensors where the model itself does not hold them whole.
    """
    with atomic(folder / ARCHITECTURE) as file:
        file.write(configs.to_yaml(model.config).encode())
    with atomic(folder / WEIGHTS) as file:
        file.write(safetensors.torch.save(_tensors(model, state)))


def save_hf(model: Model, folder: Path, special: Mapping[str, int]) -> None:
    """Write a captioner, a filter or a model that answers as `from_pretrained` of transformers reads it.

    `special` are the ids of "pad" and "sep". ModelError for a model of both roles: transformers has no class for it.
    """
    own = _tensors(model)
    temperature = float(own.pop("temperature", torch.tensor(model.config.temperature)))
    if isinstance(model, Blip2):
        described = transformers_config2.describe(model.config, temperature)
        tensors = {theirs[0]: own[ours] for ours, theirs in _hf_names(model.config).items()}
    else:
        described = transformers_config.describe(model.config, temperature, special)
        # safetensors refuses one storage under two names.
        tensors = {name: tensor.clone() for name, tensor in key_maps.give(own, model.config, "hf").items()}
    write_json(folder / transformers_config.CONFIG, described)
    with atomic(folder / WEIGHTS) as file:
        file.write(safetensors.torch.save(tensors, metadata={"format": "pt"}))


def save_pth(model: Model, path: Path) -> None:
    """Write a model under the names of BLIP's own code, and beside it in a YAML what such a file does not say."""
    if not isinstance(model, Blip):
        raise ModelError(f"BLIP's own code has no model of the family {model.config.family}: export it --as hf")
    with atomic(path.with_suffix(".yaml")) as file:
        file.write(configs.to_yaml(model.config).encode())
    with atomic(path) as file:
        torch.save({"model": key_maps.give(_tensors(model), model.config, "pth")}, file)


def _tensors(model: Model, state: Mapping[str, Tensor] | None = None) -> Tensors:
    every = model.state_dict() if state is None else state
    return {name: every[name].detach().cpu().contiguous() for name in own_names(model)}


def _hf_names(config: Architecture) -> key_maps.Names:
    if isinstance(config, BlipConfig):
        return key_maps.names(config, "hf")
    return transformers_config2.names(config, _language_names(config))


def _language_names(config: Blip2Config) -> list[str]:
    if config.language is None:
        return []
    model = blank(config)
    return [name.removeprefix("language.") for name in own_names(model) if name.startswith("language.")]


def _read_hf(folder: Path, only: set[str] | None = None) -> tuple[Architecture, Tensors]:
    config, file = transformers_config.read(folder), files.weights_file(folder)
    if file is None:
        raise ModelError(
            f"{folder} has {transformers_config.CONFIG} and no weights; it needs {files.SAFE} or {files.BIN}"
        )
    tensors = files.tensors(file, lambda name: only is None or name in only)
    if config["architectures"][0] in transformers_config.BLIP2:
        return _read_blip2(config, tensors, folder)
    here = key_maps.OUTPUT in tensors
    tied = key_maps.settle_head(tensors) and (here or transformers_config.declares_tied(config))
    return transformers_config.architecture(config, tied, folder), tensors


def _read_blip2(config: Mapping[str, Any], tensors: Tensors, folder: Path) -> tuple[Blip2Config, Tensors]:
    with transformers_config.possible(folder):
        own = transformers_config2.architecture(config, True, folder)
    if own.language is None:
        return own, tensors
    model = blank(own)
    assert isinstance(model, Blip2)
    second = {
        transformers_config2.renamed(name): transformers_config2.renamed(first) for name, first in model.tied().items()
    }
    if transformers_config2.settle_language(tensors, second):
        return own, tensors
    return own.model_copy(update={"language": own.language.model_copy(update={"tied": False})}), tensors


def _read_pth(path: Path) -> tuple[Architecture, Tensors]:
    tensors = files.tensors(path)
    tied = key_maps.settle_head(tensors)
    beside = path.with_suffix(".yaml")
    if not beside.is_file():
        return key_maps.from_shapes(tensors, path), tensors
    return _changed(configs.read(beside, BlipConfig), {"tie_lm_head": tied}), tensors


def _changed(config: Architecture, changes: Mapping[str, object]) -> Architecture:
    text = {k: v for k, v in changes.items() if k in type(config.text).model_fields}
    vision = {k: v for k, v in changes.items() if k in type(config.vision).model_fields}
    own = {k: v for k, v in changes.items() if k == "itm_token" and k in type(config).model_fields}
    unknown = changes.keys() - text.keys() - vision.keys() - own.keys()
    assert not unknown, f"no such part of an architecture: {unknown}"
    return config.model_copy(
        update={
            "text": config.text.model_copy(update=text),
            "vision": config.vision.model_copy(update=vision),
            **own,
        }
    )
