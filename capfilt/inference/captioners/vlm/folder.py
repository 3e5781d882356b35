"""The folder of a vision-language model of transformers: where it lies, whether it can be used, and which one it is.

No code of the folder is run and no pickle is opened, so a model can be taken from anyone; only its weights as
safetensors and its descriptions are read.
"""

from __future__ import annotations

import re
from pathlib import Path

from capfilt.errors import ModelError, NoModelError, RecipeError
from capfilt.models.checkpoints import files
from capfilt.runs.ledger import fingerprint as digest_of
from capfilt.storage import safe_paths
from capfilt.storage.atomic import sha256_file
from capfilt.storage.documents import read_model_object
from capfilt.storage.local_copies import local_copy
from capfilt.storage.paths import StoragePath, storage_path
from capfilt.storage.remote_path import RemotePath

CONFIG = "config.json"
_WANTED = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors")
"""What is fetched of a name on the hub, and what decides how a model reads and writes."""


def find(name: str) -> StoragePath:
    """Where a model lies: a folder, a folder on a store, or what the Hugging Face hub has under that name, fetched;
    NAME@REVISION is a revision of it.

    Raises:
        NoModelError: nothing there that is a model of transformers.
        ModelError: the hub does not give it.
    """
    path = storage_path(name).absolute()
    if not isinstance(path, RemotePath) and not path.exists():
        hub, _, revision = name.partition("@")
        return files.snapshot(hub, [*_WANTED], revision or None)
    if not (path / CONFIG).is_file():
        raise NoModelError(f"{name} is no model of transformers: it has no {CONFIG}; give a folder that has, or a name")
    if isinstance(path, Path):
        safe_paths.check_model(path)
    return path


def model_type(path: StoragePath) -> str:
    """What transformers calls a model's architecture.

    Raises:
        ModelError: a folder that does not say it.
    """
    described = _described(local_copy(path))
    named = described.get("model_type")
    if not isinstance(named, str) or not re.fullmatch(r"[\w.-]{1,60}", named):
        raise ModelError(f"{path}/{CONFIG} does not say its model_type; it describes no model of transformers")
    return named


def check(path: StoragePath) -> None:
    """Refuse a model that cannot write texts of images, and one that needs code or pickles of its own.

    Raises:
        RecipeError: a model of another kind.
        ModelError: no weights, or none as safetensors.
    """
    folder, named = local_copy(path), model_type(path)
    weights(folder)
    # Imports torch: not before what is cheap was checked.
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KNOWN

    if named in KNOWN:
        return
    if "auto_map" in _described(folder):
        raise RecipeError(
            f"{path} is a model with code of its own ({named}), which is not run; take one that transformers has itself"
        )
    raise RecipeError(
        f"{path} is a {named}, which does not answer in texts about images; take a vision-language model"
        " (LLaVA, Qwen-VL, SmolVLM, ...), or give a captioner of capfilt's families without hf:"
    )


def weights(folder: Path) -> list[Path]:
    """The files with a model's tensors. ModelError where there are none as safetensors."""
    found = next((folder / name for name in (files.SAFE, files.INDEX) if (folder / name).is_file()), None)
    if found is None:
        other = (
            "only pickles, which can run code; save it as safetensors" if files.weights_file(folder) else "no weights"
        )
        raise ModelError(f"{folder} has {other}: {files.SAFE} or {files.INDEX} with its files is read")
    return files.parts(found)


def fingerprint(path: StoragePath) -> str:
    """Which model this is: its type, and the sha256 of its weights and of everything that says how it reads and writes:
    another chat template is another captioner."""
    folder = local_copy(path)
    parts = weights(folder)
    beside = sorted({file for pattern in _WANTED for file in folder.glob(pattern) if file.is_file()} - {*parts})
    described = [f"{file.name} {sha256_file(file)}" for file in beside if file.suffix != ".safetensors"]
    return f"{model_type(path)}-{digest_of([sha256_file(part) for part in parts], described)}"


def _described(folder: Path) -> dict[str, object]:
    try:
        return dict(read_model_object(folder / CONFIG))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / CONFIG} cannot be read ({error}); fetch the model again") from None
