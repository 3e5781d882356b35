"""Checkpoint files: where they lie, on disk or on the Hugging Face hub, and the tensors in them.

A `.pth` or `.bin` is a pickle, which can run code; only tensors and plain containers are ever read out of one.
"""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import safetensors

from capfilt.errors import ModelError, NoModelError
from capfilt.storage.documents import read_model_object
from capfilt.storage.local_copies import local_copy
from capfilt.storage.paths import storage_path

if TYPE_CHECKING:
    from torch import Tensor

SAFE, BIN = "model.safetensors", "pytorch_model.bin"
INDEX, BIN_INDEX = f"{SAFE}.index.json", f"{BIN}.index.json"
"""What a large model has in place of SAFE or BIN: which of several files has which tensor."""
OTHER_WEIGHTS = (SAFE, INDEX, BIN, BIN_INDEX)
OPEN_CLIP = "open_clip_config.json"
"""What describes the model in a folder of open_clip."""
OPEN_CLIP_SAFE, OPEN_CLIP_BIN = OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
PICKLES = (".pth", ".pt", ".ckpt", ".th", ".bin")
Tensors: TypeAlias = "dict[str, Tensor]"

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
VOCABULARY = "vocab.txt"
BESIDE = (
    *(VOCABULARY, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "spiece.model", "preprocessor_config.json", "processor_config.json"),
    *(OPEN_CLIP, "bpe_simple_vocab_16e6.txt.gz"),
)
"""What lies beside the weights and decides how a model reads: the files of tokenizers and of image processors."""
_WANTED = ["config.json", *BESIDE]
_IN_PARTS = [INDEX, "model-*.safetensors"]
_PICKLED = [BIN, BIN_INDEX, "pytorch_model-*.bin"]
_OPEN_CLIP = [[name] for name in OPEN_CLIP_WEIGHTS]


def weights_file(path: Path) -> Path | None:
    """The file that holds the tensors of a checkpoint: the path itself, or what lies in that folder; None if nothing.

    safetensors come before pickles: hub folders often have both.
    """
    if path.is_file():
        return path if path.suffix in (*PICKLES, ".safetensors") or path.name in (INDEX, BIN_INDEX) else None
    names = (*OTHER_WEIGHTS, *OPEN_CLIP_WEIGHTS)
    return next((path / name for name in names if (path / name).is_file()), None)


def parts(path: Path) -> list[Path]:
    """The files in which a weights file's tensors are: itself, or those of an index.

    Raises:
        ModelError: an index that is none, or that names a file which is not there.
    """
    return [path] if path.name not in (INDEX, BIN_INDEX) else sorted({*_weight_map(path).values()})


def _weight_map(index: Path) -> dict[str, Path]:
    """Which file has which tensor; only files beside the index are meant, of the index's own kind."""
    try:
        table = read_model_object(index).get("weight_map")
    except (OSError, ValueError) as error:
        raise ModelError(f"{index} is no index of weights ({error})") from None
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise ModelError(f"{index} is no index of weights: it has no weight_map of file names")
    suffix = ".safetensors" if index.name == INDEX else ".bin"
    for name in sorted(set(table.values())):
        if not re.fullmatch(r"[\w-][\w.-]*", name) or not name.endswith(suffix):
            raise ModelError(
                f"{index} names the file {name[:100]!r}; allowed are files beside it that end with {suffix}"
            )
        if not (index.parent / name).is_file():
            raise ModelError(f"{index} names {name}, which is not beside it; fetch all files of the model")
    return {tensor: index.parent / name for tensor, name in table.items()}


def tensors(path: Path, only: Callable[[str], bool] = lambda name: True) -> Tensors:
    """The tensors of a file whose names `only` accepts, on the CPU.

    Raises:
        ModelError: no file, a broken one, or a pickle of more than tensors.
    """
    if not path.is_file():
        raise ModelError(f"no weights at {path}")
    if path.name in (INDEX, BIN_INDEX):
        return _in_parts(path, only)
    return _unpickled(path, only) if path.suffix in PICKLES else _safe(path, only)


def _in_parts(index: Path, only: Callable[[str], bool]) -> Tensors:
    """The tensors of several files, each where the index says, and none in two."""
    where = _weight_map(index)
    merged: Tensors = {}
    for part in parts(index):
        tensors = _unpickled(part, only) if part.suffix in PICKLES else _safe(part, only)
        if twice := sorted(merged.keys() & tensors.keys()):
            raise ModelError(f"{index}: {twice[0]} is in {part.name} and in another of its files; it must be in one")
        merged |= tensors
        if missing := sorted(name for name in where if where[name] == part and only(name) and name not in tensors):
            raise ModelError(f"{part} lacks {missing[0]} ({len(missing)} in all), which {index.name} says it has")
    return merged


def _safe(path: Path, only: Callable[[str], bool]) -> Tensors:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in filter(only, file.keys())}
    except safetensors.SafetensorError as error:
        raise ModelError(f"{path} is not a whole safetensors file: {error}") from None


_UNREADABLE = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, LookupError, AttributeError),
    *(ArithmeticError, struct.error, zipfile.BadZipFile, zlib.error),
)
"""What the restricted unpicklers, torch's and that of `torchscript`, raise of bytes that are no tensors."""


def _why_unreadable(error: Exception) -> str:
    """What the file holds, in our words: torch's advise to load the file without restrictions."""
    match = re.search(r"GLOBAL (\S+)", str(error))
    if match:
        return f"it holds {match[1].rstrip('.')}"
    return "it is damaged, or no checkpoint"


def _unpickled(path: Path, only: Callable[[str], bool]) -> Tensors:
    import torch

    from capfilt.models.checkpoints import torchscript

    try:
        if torchscript.is_archive(path):
            tree: Any = torchscript.tensors(path)
        else:  # checkpoints from before torch 1.6 are no zip files and cannot be mapped into memory
            tree = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except _UNREADABLE as error:
        raise ModelError(
            f"{path} cannot be read as tensors alone ({_why_unreadable(error)}); other pickles are not opened, they can"
            " run code: save its state_dict alone, as safetensors or with torch.save, where you trust it."
        ) from None
    for wrapper in ("model", "state_dict", "module"):
        if isinstance(tree, dict) and isinstance(tree.get(wrapper), dict):
            tree = tree[wrapper]
            if wrapper == "module":  # DeepSpeed's
                tree = {str(name).removeprefix("module."): tensor for name, tensor in tree.items()}
    if not isinstance(tree, dict) or not all(isinstance(value, torch.Tensor) for value in tree.values()):
        raise ModelError(
            f"{path} holds no table of tensors; a checkpoint is one, or has one under 'model', 'state_dict' or 'module'"
        )
    return {name: tensor for name, tensor in tree.items() if only(name)}


def fetched(source: str) -> Path:
    """A checkpoint's path on this machine, there or not; one on a store is copied here.

    Raises:
        ModelError: the store does not give it.
    """
    try:
        return local_copy(source)
    except OSError as error:
        raise ModelError(f"{source}: {error}") from error


def refuse_missing(name: str) -> None:
    """Raise NoModelError for what is neither here, nor on a store, nor can be on the hub, which is not asked."""
    if not storage_path(name).exists() and not _HUB_NAME.fullmatch(name):
        raise NoModelError(f"{name}: no such file or folder, and names on the Hugging Face hub look like OWNER/NAME")


def download(name: str, weights: bool = True, open_clip: bool = False) -> Path:
    """The folder of a hub repository in the hub's cache, fetched if it is not there yet: what describes a model, its
    tokenizer, and with `weights` its tensors, in whichever form the repository has them, or in open_clip's alone.

    Raises:
        ModelError: `name` is not of the form OWNER/NAME, or the hub does not give it.
    """
    # Large models lie in several files, and older repositories have pickles alone; many have two forms of all.
    forms = _OPEN_CLIP if open_clip else [[SAFE], _IN_PARTS, _PICKLED, *_OPEN_CLIP]
    for form in forms if weights else [[]]:
        folder = snapshot(name, [*_WANTED, *form])
        if weights_file(folder) is not None:
            break
    return folder


def snapshot(name: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """The folder of a hub repository in the hub's cache with the files of these patterns, fetched if not there yet.

    Raises:
        ModelError: `name` is not of the form OWNER/NAME, or the hub does not give it.
    """
    refuse_missing(name)
    # Imported here: of a hundred runs, ninety-nine have their models on disk.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*patterns]))
    except (OSError, ValueError, HTTPError) as error:
        why = str(error).partition("\n")[0].partition(". ")[0]
        raise ModelError(
            f"{name}: no such file or folder here, and the Hugging Face hub did not give it either ({why}). "
            "Without a network: fetch its config.json, its weights and the files of its tokenizer elsewhere and give "
            "their folder."
        ) from None
