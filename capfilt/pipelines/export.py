"""export: write a model for other code to read, transformers' `from_pretrained` above all.

Where transformers has a class for the parts of a model alone, each part gets a folder, with a README of how to use it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capfilt.data.exports import NAMES as DATA_FORMS
from capfilt.data.images.preprocess import ALONE, Preprocess
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.errors import FolderError, NoModelError, UsageError, did_you_mean
from capfilt.inference.roles import preprocess_for, save_preprocess, tokenizer_for
from capfilt.models import ArchitectureConfig, family_of
from capfilt.models.checkpoints import files, store
from capfilt.storage.atomic import atomic, write_json
from capfilt.storage.local_copies import local_copy
from capfilt.storage.paths import storage_path
from capfilt.storage.remote_path import RemotePath

if TYPE_CHECKING:
    from capfilt.models.interface import Model

OF_DATA = f"data leave as {', '.join(DATA_FORMS)}"


def run(name: str, form: str, where: str | Path, sources: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The verb: read a model of any layout and write it in another; returns the folders and what was left behind.
    `sources` says where the parts lie that a `.pth` lacks ("vision", "language").

    Raises:
        UsageError: an unknown form, or an `out` that is no folder of this machine.
        FolderError: `out` holds something already.
        ModelError: no model there, or one that does not fit.
    """
    if form not in FORMS:
        raise UsageError(
            f"--as {form}: a model leaves as {', '.join(FORMS)}; {OF_DATA}.{did_you_mean(form, [*FORMS, *DATA_FORMS])}"
        )
    out = storage_path(where)
    if isinstance(out, RemotePath):
        raise UsageError(f"--out {where} is on a store; export into a folder of this machine and copy that there.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FolderError(f"{out} holds something already; choose another --out")
    try:
        path = store.find(name)
    except NoModelError as error:
        raise NoModelError(f"{str(error).rstrip('.')}; {OF_DATA}.") from None
    with completed(local_copy(path), sources or {}, out.absolute().parent) as whole:
        config = store.architecture(whole)
        written = FORMS[form](whole, tokenizer_for(whole, config), out)
        behind = store.left_behind(path, config) | left_out(config, form)
    return {"model": str(path), "as": form, "written": [str(x) for x in written], "left_behind": behind}


def left_out(config: ArchitectureConfig, form: str) -> dict[str, int]:
    """How many tensors of a model have no place in a form, by the reason."""
    if form == "hf":
        return store.transformers_format(config).left_out(config)
    original = family_of(config).code.original
    return original.left_out(config) if form == "pth" and original is not None else {}


@contextmanager
def completed(path: Path, sources: Mapping[str, str], room: Path) -> Iterator[Path]:
    """A model with the parts that it lacks, in a folder of our own that lies in `room` for a while; without `sources`
    the model itself."""
    if not sources:
        yield path
        return
    model = store.load_filled(path, sources)
    room.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=room, prefix=".export-") as scratch:
        beside = path
        if model.config.language_kind is not None and "language" in sources:
            beside = files.fetched(sources["language"])
            beside = beside if beside.is_dir() else files.download(sources["language"], weights=False)
        as_capfilt_model(model, path, tokenizer_for(beside, model.config), Path(scratch))
        yield Path(scratch)


def as_hf(path: Path, tokenizer: Tokenizer, out: Path) -> list[Path]:
    """One folder for `from_pretrained`, or two of a pretrained model."""
    config = store.architecture(path)
    picture = preprocess_for(path, config)
    parts = store.transformers_format(config).parts(config)
    return [
        write_hf(store.load(path, None, **changes), tokenizer, picture, out / part) for part, changes in parts.items()
    ]


def write_hf(model: Model, tokenizer: Tokenizer, picture: Preprocess, folder: Path) -> Path:
    """A folder of transformers: the processor's files and the model's; the weights come last."""
    config, form = model.config, store.transformers_format(model.config)
    tokenizer.save(folder)
    settings = {
        **tokenizer.settings,
        "model_max_length": config.max_positions,
        "model_input_names": ["input_ids", "attention_mask"],
        **form.processor,
        **form.special_tokens,
    }
    if config.language_kind is None:  # a language model's tokenizer has written its own
        write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / ALONE, {**picture.to_transformers(config.image_size), **form.processor})
    usage = form.usage(config).replace("FOLDER", f'"{folder.name}"').replace("END)  #", f"{tokenizer.sep})  #")
    with atomic(folder / "README.md") as file:
        file.write(f"# {folder.name}\n\nWritten by `capfilt export`, for transformers:\n{usage}".encode())
    store.save_hf(model, folder, {"pad": tokenizer.pad, "sep": tokenizer.sep})
    return folder


def as_pth(path: Path, tokenizer: Tokenizer, out: Path) -> list[Path]:
    """`model.pth` with the names of the family's own code (of ViLT `model.ckpt`), all of the model in one."""
    tokenizer.save(out)
    model = store.load(path)
    save_preprocess(path, model.config, out)
    original = family_of(model.config).code.original
    file = out / f"model{original.suffix if original else '.pth'}"
    store.save_pth(model, file)
    return [file]


def as_open_clip(path: Path, tokenizer: Tokenizer, out: Path) -> list[Path]:
    """A folder that open_clip loads as `local-dir:`."""
    model = store.load(path)
    preprocess = preprocess_for(path, model.config).to_open_clip(model.config.image_size)
    store.save_open_clip(model, out, preprocess)
    tokenizer.save(out)
    return [out]


def as_capfilt(path: Path, tokenizer: Tokenizer, out: Path) -> list[Path]:
    """A folder of our own; from outside models, the one place where `itm_token` can be set by hand."""
    as_capfilt_model(store.load(path), path, tokenizer, out)
    return [out]


def as_capfilt_model(model: Model, path: Path, tokenizer: Tokenizer, out: Path) -> None:
    """A folder of our own of a model that was read at `path`."""
    tokenizer.save(out)
    save_preprocess(path, model.config, out)
    store.save(model, out)


FORMS: dict[str, Callable[[Path, Tokenizer, Path], list[Path]]] = {
    "hf": as_hf,
    "pth": as_pth,
    "open_clip": as_open_clip,
    "capfilt": as_capfilt,
}
"""What `--as` can be."""
