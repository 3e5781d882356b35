"""ViLT's checkpoints: transformers' six classes, and the `.ckpt` of its own code (dandelin/ViLT).

ViLT's own code has norms of two epsilons, 1e-12 of embeddings and 1e-6 of blocks; transformers has one for all. A
folder that is written here says the blocks' own in `block_norm_eps`, which is read here alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from capfilt.errors import ModelError
from capfilt.models.architecture import ArchitectureConfig
from capfilt.models.checkpoints import towers
from capfilt.models.checkpoints.files import Tensors
from capfilt.models.checkpoints.fill import load_whole
from capfilt.models.checkpoints.key_maps import EMBEDDINGS, MLM_HEAD, TIMM_VISION, Table, expand, once
from capfilt.models.checkpoints.transformers_folder import STACK, possible, square
from capfilt.models.family import FamilyCode
from capfilt.models.interface import Names, OriginalFormat, TransformersFormat
from capfilt.models.layers.vit import VISION_BLOCK
from capfilt.models.vilt.config import Head, ViltConfig
from capfilt.models.vilt.model import Vilt

HEADS: dict[Head, Table] = {
    "mlm": MLM_HEAD,
    "itm": {"match_head.*": "itm_score.fc.*"},
    "rank": {"rank_head.*": "rank_output.*"},
    "vqa": {f"classifier.{n}.*": f"vqa_classifier.{n}.*" for n in (0, 1, 3)},
    "nlvr2": {f"classifier.{n}.*": f"nlvr2_classifier.{n}.*" for n in (0, 1, 3)},
    "tokens": {"classifier.*": "classifier.*"},
}
"""The heads, as ViLT's own code names them; it has none for tokens."""
CLASSES: dict[str, tuple[Head, ...]] = {
    "ViltModel": (),
    "ViltForMaskedLM": ("mlm",),
    "ViltForImageAndTextRetrieval": ("rank",),
    "ViltForQuestionAnswering": ("vqa",),
    "ViltForImagesAndTextClassification": ("nlvr2",),
    "ViltForTokenClassification": ("tokens",),
}
"""The heads of each class of transformers."""
IGNORED = {
    r".*text_embeddings\.position_ids": "a constant, 0, 1, 2, ...",
    r"(train|val|dev|test)_\w+": "what its trainer measured",
    r"mpp_score\..*": "the head of masked patches, which the paper tried and left out",
}
"""Keys that are left behind on purpose, and why."""
EPS = {"text": 1e-12, "vision": 1e-6}
"""Of the norms in ViLT's own code."""
WORDS = {"hf": "embeddings.text_embeddings.word_embeddings.weight", "ckpt": "text_embeddings.word_embeddings.weight"}
OUTPUT, BIAS = "mlm_score.decoder.weight", "mlm_score.bias"


def names(config: ViltConfig, layout: str) -> Names:
    """What a file of that layout, "hf" or "ckpt", calls the tensors of a model of ours."""
    if layout == "hf":
        root = "vilt." if config.heads else ""
        text, modality = f"{root}embeddings.text_embeddings.", f"{root}embeddings.token_type_embeddings.weight"
        vision, blocks, pooler = towers.VIT, root, f"{root}pooler.dense.*"
    else:
        text, modality, vision, blocks = "text_embeddings.", "token_type_embeddings.weight", TIMM_VISION, "transformer."
        pooler = "pooler.dense.*"
    rest: Table = {"modality.weight": modality, **({"pooler.*": pooler} if config.pooled else {})}
    lines = [*expand(EMBEDDINGS, 1, "text.", text), *expand(vision, config.vision.depth, "vision.", blocks)]
    lines += expand(rest, 1, "", "")
    for head in config.heads:
        table = {
            ours: theirs for ours, theirs in HEADS[head].items() if theirs != OUTPUT or not config.text.tie_lm_head
        }
        if layout == "hf":
            table = {ours: theirs.replace(f"{head}_classifier", "classifier") for ours, theirs in table.items()}
        lines += expand(table, 1, "", "")
    return once(lines)


def unify_head(tensors: Tensors, words: str) -> bool:
    """Bring the head that guesses words to one form, in place; say whether its output matrix is the word embeddings.

    transformers of today calls its bias `decoder.bias`, and older ones and ViLT `bias`.
    """
    if (bias := tensors.pop("mlm_score.decoder.bias", None)) is not None:
        tensors[BIAS] = bias
    weight = tensors.get(OUTPUT)
    if weight is None:
        return True
    if tied := words in tensors and torch.equal(weight, tensors[words]):
        del tensors[OUTPUT]
    return tied


class ViltTransformers(TransformersFormat):
    """transformers' ViLT classes. A pretrained model becomes two folders, one for each of its heads; that which matches
    becomes one number a pair, the difference of its two, whose sigmoid is P(match)."""

    classes = tuple(CLASSES)
    telling = frozenset({OUTPUT, f"vilt.{WORDS['hf']}"})
    processor = {"processor_class": "ViltProcessor"}

    def architecture(self, described: Mapping[str, Any], tensors: Tensors, folder: Path) -> ViltConfig:
        """What a `config.json` describes; whether the head that guesses words is tied the tensors decide."""
        tensors |= (joined := dict(towers.joined(tensors)))
        for name in tensors.keys() - joined.keys():
            del tensors[name]
        tied = unify_head(tensors, f"vilt.{WORDS['hf']}")
        with possible(folder):
            return _described(described, tied, folder)

    def names(self, config: ViltConfig) -> Names:
        return names(config, "hf")

    def write(self, config: ViltConfig, tensors: Tensors, special: Mapping[str, int]) -> tuple[dict[str, Any], Tensors]:
        """The `config.json` of a model with one head, or none, and its tensors."""
        if config.heads == ("itm",):  # as the class for retrieval has it
            config = config.changed_heads(("rank",))
            for end in ("weight", "bias"):
                wrong, right = tensors.pop(f"match_head.{end}")
                tensors[f"rank_head.{end}"] = (right - wrong)[None]
        given = {theirs: tensors[ours] for ours, (theirs,) in names(config, "hf").items()}
        if BIAS in given:
            given["mlm_score.decoder.bias"] = given.pop(BIAS)
        return _describe(config), {name: t.clone() for name, t in towers.split(given)}

    def parts(self, config: ViltConfig) -> dict[str, dict[str, object]]:
        """One folder, or one for each head of a pretrained model, of which transformers' classes have one."""
        if config.heads in CLASSES.values() or config.heads == ("itm",):
            return {"": {}}
        every = {"mlm": "words", "itm": "filter", "rank": "filter"}
        if unknown := [head for head in config.heads if head not in every]:
            raise ModelError(f"transformers has no class for a ViLT with the head {unknown[0]} beside others")
        heads = [head for head in config.heads if head != "itm" or "rank" not in config.heads]
        return {every[head]: {"heads": (head,)} for head in heads}

    def usage(self, config: ViltConfig) -> str:
        name = class_of(config)
        how = {
            "ViltForImageAndTextRetrieval": "p_match = model(**inputs).logits.sigmoid()",
            "ViltForMaskedLM": "words = model(**inputs).logits.argmax(dim=2)  # where the text has [MASK]",
        }
        return f"""
    from transformers import ViltProcessor, {name}

    processor, model = ViltProcessor.from_pretrained(FOLDER), {name}.from_pretrained(FOLDER)
    inputs = processor(images=image, text=text, return_tensors="pt")
    {how.get(name, "outputs = model(**inputs)")}

transformers computes all norms with one epsilon, {config.text.layer_norm_eps:g}; those of the blocks were trained with
{config.vision.layer_norm_eps:g}.
"""


class ViltCkpt(OriginalFormat):
    """A `.ckpt` of ViLT's own code, without what its trainer pickled beside the tensors."""

    name = "ViLT"
    wrapper = "state_dict"
    suffix = ".ckpt"

    def lacks(self, tensors: Tensors) -> str:
        wanted = ("transformer.pos_embed", "transformer.blocks.0.mlp.fc1.weight", WORDS["ckpt"])
        return ", ".join(name for name in wanted if name not in tensors)

    def architecture(self, tensors: Tensors, described: ViltConfig | None, source: Path) -> ViltConfig:
        tied = unify_head(tensors, WORDS["ckpt"])
        if described is not None:
            return described.changed(tie_lm_head=tied and "mlm" in described.heads)
        if lacking := self.lacks(tensors):
            raise ModelError(f"{source} is no checkpoint of ViLT: it lacks {lacking}")
        with possible(source, "tensors"):
            return _from_shapes(tensors, tied)

    def names(self, config: ViltConfig) -> Names:
        return names(config, "ckpt")

    def write(self, config: ViltConfig, tensors: Tensors) -> Tensors:
        if "tokens" in config.heads:
            raise ModelError("ViLT's own code has no head that classifies tokens: export it --as hf")
        if "mlm" in config.heads and config.text.tie_lm_head:
            tensors["mlm_head.weight"] = tensors["text.words.weight"]
            config = config.changed(tie_lm_head=False)
        return {theirs: tensors[ours] for ours, (theirs,) in names(config, "ckpt").items()}


def class_of(config: ViltConfig) -> str:
    """The class of transformers that a model of ours can be."""
    heads: tuple[Head, ...] = ("rank",) if config.heads == ("itm",) else config.heads
    return next(name for name, theirs in CLASSES.items() if theirs == heads)


def _described(described: Mapping[str, Any], tied: bool, folder: Path) -> ViltConfig:
    """What a `config.json` says, transformers' defaults where it says nothing."""
    usual: dict[str, Any] = {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    }
    usual |= {"vocab_size": 30522, "max_position_embeddings": 40, "hidden_dropout_prob": 0.0}
    part = {**usual, "image_size": 384, "patch_size": 32, "layer_norm_eps": EPS["text"], **described}
    for key, value in {"hidden_act": "gelu", "qkv_bias": True, "num_channels": 3, "type_vocab_size": 2}.items():
        if part.get(key, value) != value:
            raise ModelError(f"{folder}: {key} is {str(part[key])[:80]}; ViLT has {value}, and so has this code")
    heads = CLASSES[described["architectures"][0]]
    labels = int(part.get("num_labels") or len(part.get("id2label") or {}) or 2) if _classifies(heads) else 0
    size, patch = square(part, "image_size", folder), square(part, "patch_size", folder)
    images = int(part.get("modality_type_vocab_size", 2)) - 1
    if "nlvr2" in heads and part.get("num_images", -1) != images:
        raise ModelError(
            f"{folder}: num_images is {part.get('num_images', -1)}, and modality_type_vocab_size has rows for {images}"
        )
    return ViltConfig.model_validate(
        {
            "vision": {
                "image_size": size,
                "patch_size": patch,
                "grid": size // patch,
                **{ours: part[theirs] for ours, theirs in STACK.items()},
                "dropout": part["hidden_dropout_prob"],
                "layer_norm_eps": part.get("block_norm_eps", part["layer_norm_eps"]),
            },
            "text": {
                "vocab_size": part["vocab_size"],
                "width": part["hidden_size"],
                "max_positions": part["max_position_embeddings"],
                "dropout": part["hidden_dropout_prob"],
                "layer_norm_eps": part["layer_norm_eps"],
                "tie_lm_head": tied and "mlm" in heads,
            },
            "heads": heads,
            "images": images,
            "labels": labels,
            "label_names": _names_of(part.get("id2label"), labels) if {"vqa", "nlvr2"} & {*heads} else (),
        }
    )


def _names_of(id2label: object, labels: int) -> tuple[str, ...]:
    """The classes of a `config.json` in lower case, as answers are spelled; none where they are numbers alone."""
    if not isinstance(id2label, dict):
        return ()
    names = tuple(str(id2label.get(str(number), id2label.get(number, ""))).lower() for number in range(labels))
    return names if len(set(names)) == labels and not all(name.startswith("label_") for name in names) else ()


def _describe(config: ViltConfig) -> dict[str, Any]:
    """The `config.json` of a model of ours."""
    vision, text = config.vision, config.text
    if vision.image_size // vision.patch_size != vision.grid:  # it has no place for a grid of another size
        vision = vision.model_copy(update={"image_size": vision.grid * vision.patch_size})
    names = config.label_names or tuple(f"LABEL_{n}" for n in range(config.labels))
    labels = {"id2label": {str(n): name for n, name in enumerate(names)}} if names else {}
    return {
        "architectures": [class_of(config)],
        "model_type": "vilt",
        "dtype": "float32",
        **{theirs: getattr(vision, ours) for ours, theirs in STACK.items()},
        "hidden_act": "gelu",
        "hidden_dropout_prob": vision.dropout,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": text.layer_norm_eps,
        **({} if vision.layer_norm_eps == text.layer_norm_eps else {"block_norm_eps": vision.layer_norm_eps}),
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.max_positions,
        "type_vocab_size": 2,
        "modality_type_vocab_size": 1 + config.images,
        "num_images": config.images if "nlvr2" in config.heads else -1,
        "tie_word_embeddings": text.tie_lm_head,
        **labels,
    }


def _classifies(heads: tuple[Head, ...]) -> bool:
    return not {"vqa", "nlvr2", "tokens"}.isdisjoint(heads)


def _from_shapes(tensors: Tensors, tied: bool) -> ViltConfig:
    """The architecture of ViLT's own tensors, whose heads of attention are 64 wide."""
    vocabulary, width = tensors[WORDS["ckpt"]].shape
    patch, grid = (
        tensors["transformer.patch_embed.proj.weight"].shape[-1],
        tensors["transformer.pos_embed"].shape[1] - 1,
    )
    numbers = {int(name.split(".")[2]) for name in tensors if name.startswith("transformer.blocks.")}
    heads: tuple[Head, ...] = tuple(
        head
        for head, table in HEADS.items()
        if head != "tokens" and next(iter(table.values())).replace("*", "weight") in tensors
    )
    last = [f"{head}_classifier.3.weight" for head in heads if _classifies((head,))]
    return ViltConfig.model_validate(
        {
            "vision": {
                "image_size": math.isqrt(grid) * patch,
                "patch_size": patch,
                "grid": math.isqrt(grid),
                "width": width,
                "depth": len(numbers),
                "heads": max(width // 64, 1),
                "hidden": tensors["transformer.blocks.0.mlp.fc1.weight"].shape[0],
            },
            "text": {
                "vocab_size": vocabulary,
                "width": width,
                "max_positions": tensors["text_embeddings.position_embeddings.weight"].shape[0],
                "tie_lm_head": tied and "mlm" in heads,
            },
            "heads": heads,
            "images": tensors["token_type_embeddings.weight"].shape[0] - 1,
            "labels": tensors[last[0]].shape[0] if last else 0,
        }
    )


def continued(config: ViltConfig, saved: ArchitectureConfig, tensors: Tensors, source: object) -> Vilt:
    """The saved model with the heads of the new architecture; heads that it lacks start fresh, but for that which
    ranks, which begins as the row of ITM's that says "matches", as ViLT's fine-tuning does."""
    assert isinstance(saved, ViltConfig), "whoever reads a recipe compares families"
    config = config.changed(tie_lm_head=config.text.tie_lm_head or ("mlm" in saved.heads and saved.text.tie_lm_head))
    fresh = [head for head in config.heads if head not in saved.heads]
    if not fresh:
        return load_whole(Vilt, config, tensors, source)
    begun = {name: tensor for name, tensor in Vilt(config).state_dict().items() if name.split(".")[0] in _parts(fresh)}
    if "rank" in fresh and "itm" in saved.heads:
        begun |= {f"rank_head.{end}": tensors[f"match_head.{end}"][1:] for end in ("weight", "bias")}
    return load_whole(Vilt, config, tensors | begun, source)


def _parts(heads: list[Head]) -> set[str]:
    """The modules that heads are made of."""
    return {ours.split(".")[0] for head in heads for ours in HEADS[head]}


def vision_from(model: Vilt, source: str) -> set[str]:
    """Fill blocks, patches and positions from a ViT, as ViLT began with ImageNet's ViT-B/32; the text starts fresh."""
    vision = model.config.vision
    table = vision.model_copy(update={"image_size": vision.grid * vision.patch_size})
    return towers.copy(model, towers.vit(table, towers.find(source), source), source)


CODE = FamilyCode(
    build=Vilt,
    blocks=(VISION_BLOCK,),
    continued=continued,
    initial={"vision": vision_from},
    transformers=ViltTransformers(),
    original=ViltCkpt(),
    ignored=IGNORED,
)
