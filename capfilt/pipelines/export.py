"""export: write a model as other code reads it, transformers' `from_pretrained` above all.

transformers has no class for a pretrained model, which writes and judges: it becomes two folders. And its class for
filters reads a text behind [CLS], where the filter was trained with [ENC]; the README beside it says what to do.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from capfilt.data.images.preprocess import ALONE, Preprocess
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.errors import RunError, UsageError, did_you_mean
from capfilt.inference.roles import preprocess_for, tokenizer_for
from capfilt.models import Blip2Config, BlipConfig, Model
from capfilt.models.blip.transformers_config import class_of
from capfilt.models.blip2 import transformers_config
from capfilt.models.checkpoints import store
from capfilt.models.layers.bert import Role
from capfilt.storage.atomic import atomic, write_json
from capfilt.storage.local_copies import local_copy
from capfilt.storage.paths import storage_path
from capfilt.storage.remote_path import RemotePath

PARTS: dict[Role, str] = {"decoder": "captioner", "encoder": "filter"}
"""What a pretrained model falls into, and the folder of each."""

README = {
    "BlipForConditionalGeneration": """
    from transformers import AutoProcessor, BlipForConditionalGeneration

    processor = AutoProcessor.from_pretrained(FOLDER)
    model = BlipForConditionalGeneration.from_pretrained(FOLDER)
    ids = model.generate(**processor(images=image, return_tensors="pt"), num_beams=3, min_length=5, max_length=20)
    print(processor.decode(ids[0], skip_special_tokens=True))
""",
    "BlipForImageTextRetrieval": """
    from transformers import AutoProcessor, BlipForImageTextRetrieval

    processor = AutoProcessor.from_pretrained(FOLDER)
    model = BlipForImageTextRetrieval.from_pretrained(FOLDER)
    inputs = processor(images=image, text=text, return_tensors="pt")
    cosine = model(**inputs, use_itm_head=False).itm_score
    inputs["input_ids"][:, 0] = ENC  # [ENC], as in training: behind [CLS] the scores are others
    p_match = model(**inputs).itm_score.softmax(dim=1)[:, 1]
""",
    "BlipForQuestionAnswering": """
    from transformers import AutoProcessor, BlipForQuestionAnswering

    processor = AutoProcessor.from_pretrained(FOLDER)
    model = BlipForQuestionAnswering.from_pretrained(FOLDER)
    inputs = processor(images=image, text=question, return_tensors="pt")
    inputs["input_ids"][:, 0] = ENC  # [ENC], as in training
    print(processor.decode(model.generate(**inputs, max_new_tokens=10)[0], skip_special_tokens=True))
""",
    "Blip2ForImageTextRetrieval": """
    from transformers import AutoImageProcessor, AutoTokenizer, Blip2ForImageTextRetrieval

    pixels = AutoImageProcessor.from_pretrained(FOLDER)(image, return_tensors="pt").pixel_values
    inputs = AutoTokenizer.from_pretrained(FOLDER)(text, return_tensors="pt")
    asked = (pixels, inputs["input_ids"], inputs["attention_mask"])
    model = Blip2ForImageTextRetrieval.from_pretrained(FOLDER)
    cosine = model(*asked).logits_per_image
    p_match = model(*asked, use_image_text_matching_head=True).logits_per_image.softmax(dim=1)[:, 1]
""",
    "Blip2ForConditionalGeneration": """
    from transformers import AutoImageProcessor, AutoTokenizer, Blip2ForConditionalGeneration

    pixels = AutoImageProcessor.from_pretrained(FOLDER)(image, return_tensors="pt").pixel_values
    model = Blip2ForConditionalGeneration.from_pretrained(FOLDER)
    ids = model.generate(pixels, max_new_tokens=30, eos_token_id=END)  # a text ends so
    print(AutoTokenizer.from_pretrained(FOLDER).decode(ids[0], skip_special_tokens=True))
""",
}


def run(name: str, form: str, where: str | Path) -> dict[str, Any]:
    """The verb: read a model of any layout and write it in another; returns the folders and what was left behind.

    Raises:
        UsageError: an unknown form, or an `out` that is no folder of this machine.
        RunError: `out` holds something already.
        ModelError: no model there, or one that does not fit.
    """
    if form not in FORMS:
        raise UsageError(f"--as {form}: there is {', '.join(FORMS)}.{did_you_mean(form, FORMS)}")
    out = storage_path(where)
    if isinstance(out, RemotePath):
        raise UsageError(f"--out {where} is on a store; export into a folder of this machine and copy that there.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} holds something already; choose another --out")
    path = store.find(name)
    tokenizer = tokenizer_for(path, store.architecture(path))
    written = FORMS[form](local_copy(path), tokenizer, out)
    config = store.architecture(path)
    here = transformers_config.without_a_place(config) if form == "hf" and isinstance(config, Blip2Config) else {}
    return {
        "model": str(path),
        "as": form,
        "written": [str(x) for x in written],
        "left_behind": store.left_behind(path) | here,
    }


def as_hf(path: Path, tokenizer: Tokenizer, out: Path) -> list[Path]:
    """One folder for `from_pretrained`, or two of a pretrained model."""
    config = store.architecture(path)
    picture = preprocess_for(path, config)
    if isinstance(config, Blip2Config):
        # Of stage 1 transformers has the half that judges; the head that writes stays behind.
        judge = store.load(path, roles=("encoder",)) if config.language is None else store.load(path)
        return [write_hf(judge, tokenizer, picture, out)]
    if len(config.text.roles) == 1 or config.answers:
        return [write_hf(store.load(path), tokenizer, picture, out)]
    return [write_hf(store.load(path, roles=(role,)), tokenizer, picture, out / part) for role, part in PARTS.items()]


def write_hf(model: Model, tokenizer: Tokenizer, picture: Preprocess, folder: Path) -> Path:
    """A folder of transformers: the processor's files and the model's; the weights come last."""
    config = model.config
    tokenizer.save(folder)
    of_blip = {"processor_class": "BlipProcessor"} if isinstance(config, BlipConfig) else {}
    marks: dict[str, Any] = {"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]} if of_blip else {}
    settings = {
        **tokenizer.settings,
        "model_max_length": config.text.max_positions,
        "model_input_names": ["input_ids", "attention_mask"],
        **of_blip,
        **marks,
    }
    if config.language_kind is None:  # a language model's tokenizer has written its own
        write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / ALONE, picture.described(config.vision.image_size) | of_blip)
    usage = README[class_of(config) if isinstance(config, BlipConfig) else transformers_config.class_of(config)]
    usage = usage.replace("FOLDER", f'"{folder.name}"').replace("END)  #", f"{tokenizer.sep})  #")
    if isinstance(config, BlipConfig):
        usage = usage.replace("ENC  #", f"{config.text.enc}  #")
    with atomic(folder / "README.md") as file:
        file.write(f"# {folder.name}\n\nWritten by `capfilt export`, for transformers:\n{usage}".encode())
    store.save_hf(model, folder, {"pad": tokenizer.pad, "sep": tokenizer.sep})
    return folder


def as_pth(path: Path, tokenizer: Tokenizer, out: Path) -> list[Path]:
    """`model.pth` with the names of BLIP's own code, all of the model in one."""
    tokenizer.save(out)
    model = store.load(path)
    preprocess_for(path, model.config).save(out, model.config.vision.image_size)
    store.save_pth(model, out / "model.pth")
    return [out / "model.pth"]


def as_capfilt(path: Path, tokenizer: Tokenizer, out: Path) -> list[Path]:
    """A folder of our own; from outside models, the one place where `itm_token` can be set by hand."""
    tokenizer.save(out)
    model = store.load(path)
    preprocess_for(path, model.config).save(out, model.config.vision.image_size)
    store.save(model, out)
    return [out]


FORMS: dict[str, Callable[[Path, Tokenizer, Path], list[Path]]] = {"hf": as_hf, "pth": as_pth, "capfilt": as_capfilt}
"""What `--as` can be."""
