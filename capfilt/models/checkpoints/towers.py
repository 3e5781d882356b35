"""Public checkpoints of single towers, by our names: a ViT of timm, DeiT or transformers, a BERT of transformers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from capfilt.errors import ModelError
from capfilt.models.checkpoints import files, key_maps
from capfilt.models.checkpoints.files import Tensors
from capfilt.models.checkpoints.key_maps import WORDS, Table
from capfilt.models.interface import Model, Names
from capfilt.models.layers.config import FusionTextConfig, TextConfig, VisionConfig
from capfilt.models.layers.vit import resize_positions

VIT: Table = {
    "cls": "embeddings.cls_token",
    "positions": "embeddings.position_embeddings",
    "patches.*": "embeddings.patch_embeddings.projection.*",
    "blocks.{n}.attention_norm.*": "encoder.layer.{n}.layernorm_before.*",
    "blocks.{n}.attention.qkv.*": "encoder.layer.{n}.attention.attention.qkv.*",
    "blocks.{n}.attention.out.*": "encoder.layer.{n}.attention.output.dense.*",
    "blocks.{n}.feed_forward_norm.*": "encoder.layer.{n}.layernorm_after.*",
    "blocks.{n}.feed_forward.up.*": "encoder.layer.{n}.intermediate.dense.*",
    "blocks.{n}.feed_forward.down.*": "encoder.layer.{n}.output.dense.*",
    "norm.*": "layernorm.*",
}
"""transformers' ViT, after its three projections were joined. DeiT's own files and timm's are TIMM_VISION."""

LEFT_BEHIND = re.compile(
    r"(head|pre_logits|classifier|pooler|cls\.seq_relationship)\..*"  # heads of other tasks
    r"|embeddings\.(token_type_embeddings\.weight|position_ids|mask_token)"
    r"|cls\.predictions\.decoder\.(weight|bias)"  # tied to the words and to cls.predictions.bias
)
POSITION_IDS = {r".*embeddings\.position_ids": "a constant, 0, 1, 2, ..."}


def find(source: str) -> Tensors:
    """The tensors of a folder, a file or a hub name."""
    path = files.fetched(source)
    path = path if path.exists() else files.download(source)
    file = files.weights_file(path)
    if file is None:
        raise ModelError(f"{source} has no weights; it needs {files.SAFE} or {files.BIN}, or to be such a file")
    return files.tensors(file)


def vit(config: VisionConfig, tensors: Tensors, source: str) -> Tensors:
    """What a ViT, or the tower of a model of ours, gives to a vision tower; positions are interpolated.

    A tower without a final norm is used before its end: the norm there, and blocks behind the last, are left behind.
    """
    if "vision.cls" in tensors:
        tensors = {name.removeprefix("vision."): t for name, t in tensors.items() if name.startswith("vision.")}
        table: Table = {ours: ours for ours in key_maps.TIMM_VISION}
    else:
        tensors = {name.removeprefix("vit."): tensor for name, tensor in tensors.items()}
        table = key_maps.TIMM_VISION if "cls_token" in tensors else VIT
    if not config.final_norm:
        table = {ours: theirs for ours, theirs in table.items() if ours != "norm.*"}
        tensors = {name: tensor for name, tensor in tensors.items() if not _behind(name, config.depth)}
    if any("dist" in name for name in tensors):
        raise ModelError(f"{source} is a distilled DeiT, with a second token beside [CLS]; take the plain one")
    wanted = key_maps.once(key_maps.expand(table, config.depth, "vision.", ""))
    taken = take(dict(joined(tensors)), wanted, source)
    taken["vision.positions"] = resize_positions(taken["vision.positions"], config.image_size, config.patch_size)
    return taken


def _behind(name: str, depth: int) -> bool:
    """Whether a tensor lies behind block number `depth` of a ViT."""
    block = re.match(r"(?:blocks|encoder\.layer)\.(\d+)\.", name)
    return int(block[1]) >= depth if block else re.match(r"(fc_norm|norm|layernorm)\.", name) is not None


def bert(tensors: Tensors) -> Tensors:
    """BERT's tensors as newer files name them, without the prefix of a model around it."""
    return {_modern(name.removeprefix("bert.")): tensor for name, tensor in tensors.items()}


def _modern(name: str) -> str:
    """Files from before 2019, bert-base-uncased among them, call a LayerNorm's weight gamma and its bias beta."""
    return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name))


def heads_of(tower: str, width: int) -> int:
    """The heads of a tower, which leave no trace in the shapes: they are 64 wide in every released checkpoint."""
    if width % 64:
        raise ValueError(
            f"its {tower} is {width} wide, not a multiple of 64, and the file does not say how many heads it has; write"
            " the architecture into a YAML of the same name beside it"
        )
    return width // 64


def vit_of_shapes(tensors: Tensors, prefix: str) -> VisionConfig:
    """The architecture of a ViT of timm whose file says nothing of it."""
    patch = tensors[f"{prefix}patch_embed.proj.weight"].shape[-1]
    tokens, width = tensors[f"{prefix}pos_embed"].shape[1:]
    return VisionConfig(
        image_size=math.isqrt(tokens - 1) * patch,
        patch_size=patch,
        width=width,
        depth=key_maps.depth(tensors, f"{prefix}blocks."),
        heads=heads_of("vision", width),
        hidden=tensors[f"{prefix}blocks.0.mlp.fc1.weight"].shape[0],
    )


def bert_of_shapes(tensors: Tensors, stack: str) -> dict[str, int]:
    """What the shapes of a stack of BERT's names say of its architecture, by the fields of a text config."""
    vocab_size, width = tensors[stack + WORDS].shape
    return {
        "vocab_size": vocab_size,
        "width": width,
        "depth": key_maps.depth(tensors, f"{stack}encoder.layer."),
        "heads": heads_of("text", width),
        "hidden": tensors[f"{stack}encoder.layer.0.intermediate.dense.weight"].shape[0],
        "max_positions": tensors[f"{stack}embeddings.position_embeddings.weight"].shape[0],
    }


def fusion_of_shapes(tensors: Tensors, stack: str) -> FusionTextConfig:
    """The same of a stack whose upper layers attend to images."""
    known = bert_of_shapes(tensors, stack)
    for layer in range(known["depth"]):
        if f"{stack}encoder.layer.{layer}.crossattention.self.query.weight" in tensors:
            return FusionTextConfig(**known, fusion_layer=layer)
    raise KeyError(f"{stack}encoder.layer.*.crossattention")


def vision_from(model: Any, source: str) -> set[str]:
    """Fill the vision tower of a model from a ViT; returns the names of its tensors."""
    return copy(model, vit(model.config.vision, find(source), source), source)


def text_from(model: Any, source: str) -> set[str]:
    """Fill a text stack from BERT, and the head that guesses hidden words if BERT has one itself."""
    return copy(model, bert_stack(model.config.text, find(source), source), source)


def bert_stack(
    config: TextConfig | FusionTextConfig, tensors: Tensors, source: str, outputs_are_words: bool = False
) -> Tensors:
    """What BERT gives to the text stack, by our names; cross-attention starts fresh. `outputs_are_words`: an output
    matrix that is not tied begins as the words."""
    tensors = bert(tensors)
    wanted = key_maps.text_names(
        config, {"encoder": "", "decoder": ""}, ("embeddings", "self_attention", "feed_forward")
    )
    if "decoder" not in config.roles:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("cls.predictions.")}
    elif "cls.predictions.bias" in tensors:
        wanted |= key_maps.once(key_maps.expand(key_maps.LM_HEAD, 1, "text.head.", "cls.predictions."))
        if outputs_are_words and not config.tie_lm_head:
            wanted["text.head.weight"] = (WORDS,)
    taken = take(tensors, wanted, source)
    return first_positions(taken, config.max_positions)


def first_positions(tensors: Tensors, most: int) -> Tensors:
    """The same with the first `most` positions: of BERT's 512 a model for captions may have the first few."""
    return {name: t[:most] if name.endswith("positions.weight") else t for name, t in tensors.items()}


def check_vocabulary(entries: int, words: int, marks: Sequence[str], source: str) -> None:
    """Refuse `entries` word embeddings for a model of `words` words and these special tokens behind them, ModelError;
    a checkpoint may have rows for the special tokens or not."""
    if entries not in (words, words + len(marks)):
        raise ModelError(
            f"{source} has {entries} words, the model {words} beside {' and '.join(marks)}: "
            f"set model.text.vocab_size={entries + len(marks)}, and tokenizer to the vocabulary that belongs to it"
        )


def take(tensors: Tensors, wanted: Names, source: str) -> Tensors:
    """What is wanted of a checkpoint; all else in it must be known to be of no use here."""
    theirs = {name for several in wanted.values() for name in several}
    useful = {name: t for name, t in tensors.items() if name in theirs or not LEFT_BEHIND.fullmatch(name)}
    return key_maps.take(useful, wanted, source, POSITION_IDS)


@torch.no_grad()
def copy(model: Model, tensors: Tensors, source: str) -> set[str]:
    """Copy tensors into a model, where the words that only it has stay as they are."""
    targets = model.state_dict()
    for name, tensor in tensors.items():
        of_words = name.endswith("words.weight") or name in ("text.head.weight", "text.head.bias")
        target, rows = targets[name], tensor.shape[0] if of_words else targets[name].shape[0]
        if tensor.shape != target[:rows].shape:
            raise ModelError(
                f"{source} does not fit the architecture: {name} is {list(target.shape)}, there {list(tensor.shape)}"
            )
        target[:rows] = tensor
    return set(tensors)


def joined(tensors: Tensors) -> Iterator[tuple[str, Tensor]]:
    """Tensors with the three projections of transformers' ViT joined into one, as timm and BLIP have it."""
    for name, tensor in tensors.items():
        if name.endswith(".attn.q_bias"):  # EVA: no bias of keys
            if (value := tensors.get(name.replace("q_bias", "v_bias"))) is None:
                raise ModelError(f"{name.replace('q_bias', 'v_bias')} is missing beside {name}")
            yield name.replace("q_bias", "qkv.bias"), torch.cat([tensor, torch.zeros_like(tensor), value])
        elif name.endswith(".attn.v_bias"):
            continue
        elif ".attention.attention.query." in name:
            parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
            if missing := [part for part in parts if part not in tensors]:
                raise ModelError(f"{missing[0]} is missing beside {name}")
            yield name.replace(".query.", ".qkv."), torch.cat([tensors[part] for part in parts])
        elif ".attention.attention." not in name:
            yield name, tensor


def split(tensors: Tensors) -> Iterator[tuple[str, Tensor]]:
    """The other way: what `joined` joins of transformers' ViT as its three projections."""
    for name, tensor in tensors.items():
        if ".attention.attention.qkv." in name:
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                yield name.replace(".qkv.", f".{part}."), third
        else:
            yield name, tensor
