"""Models on disk: our folder with `architecture.yaml` and `model.safetensors`, transformers' folder, open_clip's, and
original `.pth`.

Nothing is repaired silently: every key of a file is used, left behind for a reason that is written down, or refused by
name. How the files of other code name things each family says (`models/FAMILY/checkpoint.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from capfilt import config as configs
from capfilt.errors import ModelError, NoModelError
from capfilt.models.architecture import ArchitectureConfig
from capfilt.models.checkpoints import files, key_maps, open_clip, transformers_folder
from capfilt.models.checkpoints.files import Tensors
from capfilt.models.checkpoints.fill import distinct_names, load_whole
from capfilt.models.family import FamilyCode
from capfilt.models.registry import FAMILIES, blank, family_of, read_architecture
from capfilt.runs.ledger import fingerprint as digest_of
from capfilt.runs.run import verb_of
from capfilt.storage import safe_paths
from capfilt.storage.atomic import atomic, sha256_file, write_json
from capfilt.storage.local_copies import local_copy
from capfilt.storage.paths import StoragePath, storage_path
from capfilt.storage.remote_path import RemotePath

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from capfilt.models.interface import FolderFormat, Model, OriginalFormat, TransformersFormat

ARCHITECTURE, WEIGHTS, MOMENTUM = "architecture.yaml", files.SAFE, "momentum.safetensors"
READABLE = (
    f"a folder with {ARCHITECTURE} or the home of a training, a folder of transformers or open_clip, a .pth of BLIP,"
    " LAVIS or CLIP"
)

_ROLES = ("captioner", "filter")  # folders of a round whose models were made for a role

Layout = Literal["capfilt", "hf", "open_clip", "pth"]


def find(name: str) -> StoragePath:
    """Where a model lies, in full: a folder, a file, a folder on a store, or what the Hugging Face hub has under that
    name, fetched. With a prefix of open_clip's it is the file of weights in such a folder.

    Raises:
        NoModelError: nothing that can be read as a model is there.
        ModelError: the hub does not give it.
    """
    if str(name).startswith(open_clip.PREFIXES):
        return open_clip.find(name)
    path = storage_path(name).absolute()
    there = isinstance(path, RemotePath)
    if not there and not path.exists():
        return files.download(name)
    try:
        models = [candidate for candidate in (path, path / "checkpoint") if layout(candidate) is not None]
    except OSError as error:
        raise ModelError(f"{name} cannot be looked at ({error}); are the store's keys in the environment?") from error
    if not models:
        if what := _what_else(name, path):
            raise NoModelError(f"{name} is {what}")
        only = "on a store a model is a folder; " if there else ""
        raise NoModelError(f"{name} is no model; {only}what can be read: {READABLE}, a name on the Hugging Face hub")
    if isinstance(models[0], Path):
        safe_paths.check_model(models[0])
    return models[0]


def _what_else(name: str, path: StoragePath) -> str:
    """What a folder is that is no model, and which model in it may be meant; "" where neither is known."""
    if not isinstance(path, Path) or not path.is_dir():
        return ""
    verb = verb_of(path)
    what = f"the run folder of a `capfilt {verb}` and no model" if verb else "no model"
    homes = [
        folder for at in ("*", "round-*/*") for folder in path.glob(at) if layout(folder / "checkpoint") is not None
    ]
    if not homes:
        return f"{what}, and none is in it; give the folder of one." if verb else ""
    rounds = {home: int((re.fullmatch(r"round-(\d+)", home.parent.name) or ("", -1))[1]) for home in homes}
    newest = max(homes, key=lambda home: (rounds[home], home.name not in _ROLES, home.name))
    return f"{what}; the newest in it is {Path(name) / newest.relative_to(path) / 'checkpoint'}."


def layout(path: StoragePath) -> Layout | None:
    """Which kind of model lies there; None for anything else. A model on a store is a folder."""
    if open_clip.is_model(path):
        return "open_clip"
    if path.is_file():
        return "pth" if isinstance(path, Path) and path.suffix in files.PICKLES else None
    if (path / ARCHITECTURE).is_file():
        return "capfilt"
    return "hf" if (path / transformers_folder.CONFIG).is_file() else None


def architecture(path: StoragePath) -> ArchitectureConfig:
    """The architecture of a saved model. Of the tensors only those are read that say what is tied."""
    path = local_copy(path)
    match layout(path):
        case "capfilt":
            return read_architecture(path / ARCHITECTURE)
        case "hf":
            return _read_transformers(path, everything=False)[1]
        case "open_clip":
            return _read_open_clip(path, everything=False)[1]
        case "pth":
            original, config, tensors = _read_original(path, {})
            _refuse_lacking(path, original, _lacking(original, config, tensors))
            return config
    raise ModelError(f"{path} holds no model; what can be read: {READABLE}")


def load(path: StoragePath, computes_in: torch.dtype | None = None, **changes: object) -> Model:
    """Read a model. `changes` are fields of the architecture to set otherwise: roles, image_size, itm_token, dropout;
    `computes_in` the format in which it is to compute (`ArchitectureConfig.computing_in`).

    Tensors that the changed architecture does not have (the encoder's, for a captioner) are left behind on purpose;
    everything that it has must be in the file. Positions are interpolated when the picture size changed.

    Raises:
        ModelError: no model there, or keys that are missing, unexpected or of another shape.
    """
    path = local_copy(path)
    saved, tensors = read(path)
    config = saved.computing_in(computes_in).changed(**changes)
    return load_whole(family_of(config).code.build, config, tensors, path)


def load_continued(path: StoragePath, config: ArchitectureConfig) -> Model:
    """A model of this architecture that goes on from a saved one of its family, which may be of another shape.

    Raises:
        ModelError: no model there, or one that lacks more than may start fresh.
    """
    path = local_copy(path)
    saved, tensors = read(path)
    family, names = family_of(config).code, frozenset(tensors)
    if family.continued is None:
        model = load_whole(family.build, config, tensors, path)
    else:
        model = family.continued(config, saved, tensors, path)
    model.filled = model.filled or names
    return model


def load_filled(path: StoragePath, sources: Mapping[str, str]) -> Model:
    """Read a `.pth` that lacks parts of its model, and fill these from other checkpoints: `sources` by the part
    ("vision", "language"), as for a new model (`InitialConfig`).

    Raises:
        ModelError: a part that the file has, one that it lacks and `sources` does not name, or one that does not fit.
    """
    path = local_copy(path)
    if layout(path) != "pth":
        raise ModelError(f"{path} is not a .pth, and lacks no part: leave --{next(iter(sources))} out")
    original, config, tensors, lacking = _read_parts(path, sources)
    if there := [part for part in sources if part not in lacking]:
        raise ModelError(f"{path} has the part {there[0]}, or no place for one: leave --{there[0]} out")
    _refuse_lacking(path, original, [part for part in lacking if part not in sources])
    code = family_of(config).code
    assert code.continued is not None, "a family with separate parts goes on without them"
    model = code.continued(config, config, tensors, path)
    for part, source in sources.items():
        code.initial[part](model, source)
    return model


def read(path: Path) -> tuple[ArchitectureConfig, Tensors]:
    """A model's architecture and its tensors by our names, every key of its file accounted for."""
    match layout(path):
        case "hf":
            form, config, tensors = _read_transformers(path)
            wanted = form.names(config)
            return config, key_maps.take(tensors, wanted, path, family_of(config).code.ignored) | form.absent(config)
        case "open_clip":
            folder_format, config, tensors = _read_open_clip(path)
            return config, key_maps.take(tensors, folder_format.names(config), path, family_of(config).code.ignored)
        case "pth":
            original, config, tensors, lacking = _read_parts(path, {})
            _refuse_lacking(path, original, lacking)
            return config, tensors
    config, tensors = architecture(path), files.tensors(path / WEIGHTS)
    if config.num_layers > len(tensors):
        raise ModelError(
            f"{path}: {ARCHITECTURE} describes {config.num_layers} layers, and {WEIGHTS} has {len(tensors)} tensors"
        )
    names = key_maps.once((name, name) for name in distinct_names(blank(config)))
    return config, key_maps.take(tensors, names, path / WEIGHTS, family_of(config).code.ignored)


def read_momentum(path: StoragePath, model: Model) -> Tensors:
    """What a training kept beside its model, for a momentum copy `model`: the momentum encoders by our names, and
    `queue_image` and `queue_text`, [size, projection] each. A `.pth` of a pretraining has them too.

    Raises:
        ModelError: nothing was kept there, or it does not fit.
    """
    path = local_copy(path)
    original = family_of(model.config).code.original
    if layout(path) == "pth" and original is not None:
        kept = original.momentum(model.config, files.tensors(path), path)
    elif (path / MOMENTUM).is_file():
        kept = {name.removeprefix("model."): t for name, t in files.tensors(path / MOMENTUM).items()}
        kept.pop("pointer", None)
    else:
        raise ModelError(
            f"{path} has no momentum copy beside the model; train it with keep_momentum, or begin with "
            f"objectives.momentum_from=model"
        )
    model.adapt(kept)
    return kept


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
    folder = path if path.is_dir() else path.parent
    beside = {name: sha256_file(folder / name) for name in files.BESIDE if (folder / name).is_file()}
    digest = digest_of_files([sha256_file(part) for part in files.parts(file)], beside, layout(path) == "capfilt")
    return f"{architecture(path).family}-{digest}"


def digest_of_files(weights: Sequence[str], beside: Mapping[str, str], is_ours: bool = True) -> str:
    """What follows the family in a model's fingerprint, from the sha256 of its weights, part by part, and of each file
    of `files.BESIDE` by its name; other names are left out."""
    digests = list(weights)
    names = [name for name in files.BESIDE if name in beside]
    if not is_ours or names != [files.VOCABULARY]:
        digests += [f"{name} {beside[name]}" for name in names]
    return digests[0] if len(digests) == 1 else digest_of(digests)


def left_behind(path: StoragePath, config: ArchitectureConfig | None = None) -> dict[str, int]:
    """How many keys of a model's file are left behind on purpose, by the reason; `config` of one that lacks parts."""
    path = local_copy(path)
    file, ignored = files.weights_file(path), family_of(config or architecture(path)).code.ignored
    reasons = [key_maps.why_ignored(name, ignored) for name in (files.tensors(file) if file else ())]
    return {why: reasons.count(why) for why in ignored.values() if why in reasons}


def save(model: Model, folder: StoragePath, state: Mapping[str, Tensor] | None = None) -> None:
    """Write a model; the weights file appears only when it is whole, and last.

    `state` has its tensors where the model itself does not hold them whole.
    """
    import safetensors.torch

    with atomic(folder / ARCHITECTURE) as file:
        file.write(configs.to_yaml(model.config).encode())
    with atomic(folder / WEIGHTS) as file:
        file.write(safetensors.torch.save(_tensors(model, state)))


def save_hf(model: Model, folder: Path, special: Mapping[str, int]) -> None:
    """Write a model as `from_pretrained` of transformers reads it; `special` are the ids of "pad" and "sep".

    Raises:
        ModelError: transformers has no class for it, as for a BLIP of both roles.
    """
    import safetensors.torch

    described, tensors = transformers_format(model.config).write(model.config, _tensors(model), special)
    write_json(folder / transformers_folder.CONFIG, described)
    with atomic(folder / WEIGHTS) as file:
        file.write(safetensors.torch.save(tensors, metadata={"format": "pt"}))


def save_pth(model: Model, path: Path) -> None:
    """Write a model as the family's own code names it, and beside it in a YAML what such a file does not say."""
    import torch

    original = family_of(model.config).code.original
    if original is None:
        known = " and ".join(code.original.name for code in _codes() if code.original is not None)
        raise ModelError(f"{known}'s own code has no model of the family {model.config.family}: export it --as hf")
    with atomic(path.with_suffix(".yaml")) as file:
        file.write(configs.to_yaml(model.config).encode())
    with atomic(path) as file:
        tensors = original.write(model.config, _tensors(model))
        torch.save({original.wrapper: tensors} if original.wrapper else tensors, file)


def save_open_clip(model: Model, folder: Path, preprocess: Mapping[str, Any]) -> None:
    """Write a model as open_clip reads it with `local-dir:`; `preprocess` is its `preprocess_cfg`.

    Raises:
        ModelError: open_clip has no such model.
    """
    form = family_of(model.config).code.open_clip
    if form is None:
        raise ModelError(f"open_clip has no model of the family {model.config.family}: export it --as hf")
    described, tensors = form.write(model.config, _tensors(model))
    open_clip.save(described, preprocess, tensors, folder)


def transformers_format(config: ArchitectureConfig) -> TransformersFormat:
    """How models of this architecture's family lie in a folder of transformers; ModelError where they cannot."""
    form = family_of(config).code.transformers
    if form is None:
        raise ModelError(f"transformers has no model of the family {config.family} that is known here")
    return form


def _codes() -> list[FamilyCode]:
    return [family.code for family in FAMILIES.values()]


def _tensors(model: Model, state: Mapping[str, Tensor] | None = None) -> Tensors:
    every = model.state_dict() if state is None else state
    return {name: every[name].detach().cpu().contiguous() for name in distinct_names(model)}


def _read_transformers(folder: Path, everything: bool = True) -> tuple[TransformersFormat, ArchitectureConfig, Tensors]:
    """The format of a folder of transformers, its architecture, and its tensors or those alone that decide it."""
    forms = [code.transformers for code in _codes() if code.transformers is not None]
    described = transformers_folder.read(folder, [name for form in forms for name in form.classes])
    form = next(form for form in forms if described["architectures"][0] in form.classes)
    file = files.weights_file(folder)
    if file is None:
        raise ModelError(
            f"{folder} has {transformers_folder.CONFIG} and no weights; it needs {files.SAFE} or {files.BIN}"
        )
    tensors = files.tensors(file, lambda name: everything or name in form.telling)
    return form, form.architecture(described, tensors, folder), tensors


def _read_open_clip(path: Path, everything: bool = True) -> tuple[FolderFormat, ArchitectureConfig, Tensors]:
    """The format of a folder of open_clip, its architecture, and its tensors."""
    form = next(code.open_clip for code in _codes() if code.open_clip is not None)
    weights = open_clip.weights_of(path)
    tensors = files.tensors(weights) if everything else {}
    return form, form.architecture(open_clip.described(weights), tensors, weights.parent), tensors


def _read_original(path: Path, sources: Mapping[str, str]) -> tuple[OriginalFormat, ArchitectureConfig, Tensors]:
    """The format of a `.pth`, its architecture, as a YAML beside it or the tensors' shapes tell it, and its tensors;
    `sources` say where parts lie that it lacks."""
    tensors, beside = files.tensors(path), path.with_suffix(".yaml")
    described = read_architecture(beside) if beside.is_file() else None
    original = _whose(tensors, path) if described is None else family_of(described).code.original
    if original is None:
        raise ModelError(f"{beside} describes a model of a family whose own code has no .pth that can be read")
    if described is None and sources:
        described = original.describe(tensors, sources, path)
    return original, original.architecture(tensors, described, path), tensors


def _read_parts(
    path: Path, sources: Mapping[str, str]
) -> tuple[OriginalFormat, ArchitectureConfig, Tensors, list[str]]:
    """The format of a `.pth`, its architecture, its tensors by our names, and the parts that it lacks as a whole."""
    original, config, tensors = _read_original(path, sources)
    lacking = _lacking(original, config, tensors)
    wanted = {ours: named for ours, named in original.names(config).items() if ours.partition(".")[0] not in lacking}
    return original, config, key_maps.take(tensors, wanted, path, family_of(config).code.ignored), lacking


def _lacking(original: OriginalFormat, config: ArchitectureConfig, tensors: Tensors) -> list[str]:
    """The parts that may lie elsewhere and of which a file has nothing."""
    if not original.separate:
        return []
    of_part: dict[str, list[str]] = {}
    for ours, named in original.names(config).items():
        of_part.setdefault(ours.partition(".")[0], []).extend(named)
    return [part for part in original.separate if of_part.get(part) and not tensors.keys() & set(of_part[part])]


def _refuse_lacking(path: Path, original: OriginalFormat, parts: list[str]) -> None:
    """Refuse a file that lacks parts, saying how to put them there; ModelError."""
    if parts:
        what = " and ".join(original.separate[part] for part in parts)
        options = " ".join(f"--{part} FILE-OR-NAME" for part in parts)
        raise ModelError(
            f"{path} lacks {what}: complete it with `capfilt export {path} --as capfilt {options} --out FOLDER` and "
            "take that folder"
        )


def _whose(tensors: Tensors, path: Path) -> OriginalFormat:
    originals = [code.original for code in _codes() if code.original is not None]
    lacking = {original: original.lacks(tensors) for original in originals}
    if original := next((original for original, lack in lacking.items() if not lack), None):
        return original
    whys = (f"{path} is no checkpoint of {one.name}: it lacks {lack}" for one, lack in lacking.items())
    raise ModelError("; ".join(whys))
