"""What a pretraining begins from: an ImageNet ViT and BERT, as in the paper (BLIP, section 4.1), from files or the hub.

BERT's token types are dropped, as BLIP drops them, though BERT adds the first of them to every word. Cross-attention is
in neither: it starts fresh, and so do [DEC], [ENC] and the heads that compare.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from capfilt.config import Config
from capfilt.errors import ModelError
from capfilt.models import Model
from capfilt.models.blip import key_maps
from capfilt.models.blip.key_maps import Table
from capfilt.models.blip.model import Blip
from capfilt.models.blip2.language_model import load_language
from capfilt.models.blip2.model import Blip2
from capfilt.models.blip2.qformer import QFormerConfig
from capfilt.models.checkpoints import files
from capfilt.models.checkpoints.files import Tensors
from capfilt.models.layers.bert import TextConfig
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

QUERIES = {"self_attention": "self_attention", "query_feed_forward": "feed_forward", "feed_forward": "feed_forward"}
"""The parts of the Q-Former that begin as parts of BERT."""

LEFT_BEHIND = re.compile(
    r"(head|pre_logits|classifier|pooler|cls\.seq_relationship)\..*"  # heads of other tasks
    r"|embeddings\.(token_type_embeddings\.weight|position_ids|mask_token)"
    r"|cls\.predictions\.decoder\.(weight|bias)"  # tied to the words and to cls.predictions.bias
)


class InitialConfig(Config):
    """Where the first weights of a new model come from; what is not given starts from random ones."""

    vision: str | None = None
    """A ViT of timm, DeiT or transformers: a folder, a file, one on a store, or a name on the hub. The paper:
    facebook/deit-base-patch16-224; timm/vit_large_patch16_224.augreg_in21k for ViT-L."""
    text: str | None = None
    """A BERT of transformers, likewise. The paper: google-bert/bert-base-uncased."""
    language: str | None = None
    """BLIP-2's stage 2: an OPT or Flan-T5 of transformers, a folder or a hub name. It may stand beside `start`."""

    def located(self) -> InitialConfig:
        """The same with every path in full: a worker may start in another folder."""
        given = self.model_dump(exclude_none=True)
        return InitialConfig(**{k: str(Path(v).absolute()) if Path(v).exists() else v for k, v in given.items()})


@dataclass(frozen=True)
class Initialised:
    """Which tensors of a new model came from checkpoints, and which keep their random values."""

    filled: tuple[str, ...]
    fresh: tuple[str, ...]


def initialise(
    model: Model, vision: str | None = None, text: str | None = None, language: str | None = None
) -> Initialised:
    """Fill a new model's towers from checkpoints, in place.

    Raises:
        ModelError: a checkpoint that is not there, or does not fit.
    """
    filled: set[str] = set()
    if vision is not None:
        filled |= copy(model, vision_of(model, find(vision), vision), vision)
    if text is not None:
        found = find(text)
        filled |= copy(
            model, text_of(model, found, text) if isinstance(model, Blip) else queries_of(model, found, text), text
        )
    if language is not None:
        filled |= put_language(model, language)
    return Initialised(tuple(sorted(filled)), tuple(sorted(model.state_dict().keys() - filled)))


def find(source: str) -> Tensors:
    """The tensors of a folder, a file or a hub name."""
    path = files.fetched(source)
    path = path if path.exists() else files.download(source)
    file = files.weights_file(path)
    if file is None:
        raise ModelError(f"{source} has no weights; it needs {files.SAFE} or {files.BIN}, or to be such a file")
    return files.tensors(file)


def put_language(model: Model, source: str) -> set[str]:
    """Give a model of BLIP-2's second stage its language model; returns the names of its tensors.

    Raises:
        ModelError: a model that has no place for one, or a language model that does not fit.
    """
    if not isinstance(model, Blip2) or model.config.language is None:
        raise ModelError(f"initial.language is {source}, and the architecture has no language model: leave it out")
    model.language = load_language(source, model.config.language, model.config.frozen)
    return {name for name in model.state_dict() if name.startswith("language.")}


def vision_of(model: Model, tensors: Tensors, source: str) -> Tensors:
    """What a ViT, or the tower of a model of ours, gives to the vision tower; positions are interpolated.

    A tower without a final norm is used before its end: the norm there, and blocks behind the last, are left behind.
    """
    config = model.config.vision
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
    found = take(dict(joined(tensors)), wanted, source)
    found["vision.positions"] = resize_positions(found["vision.positions"], config.image_size, config.patch_size)
    return found


def _behind(name: str, depth: int) -> bool:
    """Whether a tensor lies behind block number `depth` of a ViT."""
    block = re.match(r"(?:blocks|encoder\.layer)\.(\d+)\.", name)
    return int(block[1]) >= depth if block else re.match(r"(fc_norm|norm|layernorm)\.", name) is not None


def queries_of(model: Blip2, tensors: Tensors, source: str) -> Tensors:
    """What BERT gives to the Q-Former: its feed-forward to texts and to queries (BLIP-2's public code)."""
    config = model.config.text
    tensors = {_modern(name.removeprefix("bert.")): tensor for name, tensor in tensors.items()}
    lines = [*key_maps.expand({"norm.*": "embeddings.LayerNorm.*"}, 1, "text.", "")]
    if config.roles:
        lines += [
            ("text.words.weight", key_maps.WORDS),
            ("text.positions.weight", "embeddings.position_embeddings.weight"),
        ]
    for part, theirs in QUERIES.items():
        if part != "feed_forward" or config.roles:
            lines += key_maps.expand(key_maps.BERT[theirs], config.depth, f"text.layers.{{n}}.{part}.", "")
    if "decoder" in config.roles and "cls.predictions.bias" in tensors:
        lines += key_maps.expand(key_maps.LM_HEAD, 1, "text.head.", "cls.predictions.")
    wanted = key_maps.once(lines)
    used = {theirs for several in wanted.values() for theirs in several}
    spare = ("cls.predictions.", "embeddings.word", "embeddings.position_embeddings")
    tensors = {name: t for name, t in tensors.items() if name in used or not name.startswith(spare)}
    found = take(tensors, wanted, source)
    if config.roles:
        check_vocabulary(config, tensors[key_maps.WORDS].shape[0], source)
    return {name: t[: config.max_positions] if name.endswith("positions.weight") else t for name, t in found.items()}


def text_of(model: Blip, tensors: Tensors, source: str) -> Tensors:
    """What BERT gives to the text stacks, to both if they are apart, and to the LM head if it has one itself."""
    config = model.config.text
    tensors = {_modern(name.removeprefix("bert.")): tensor for name, tensor in tensors.items()}
    wanted = key_maps.text_names(
        config, {"encoder": "", "decoder": ""}, ("embeddings", "self_attention", "feed_forward")
    )
    if "decoder" not in config.roles:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("cls.predictions.")}
    elif "cls.predictions.bias" in tensors:
        wanted |= key_maps.once(key_maps.expand(key_maps.LM_HEAD, 1, "text.head.", "cls.predictions."))
        if not config.tie_lm_head:
            wanted["text.head.weight"] = (key_maps.WORDS,)
    found = take(tensors, wanted, source)
    check_vocabulary(config, tensors[key_maps.WORDS].shape[0], source)
    # Of BERT's 512 positions a model for captions may have the first few.
    return {name: t[: config.max_positions] if name.endswith("positions.weight") else t for name, t in found.items()}


def _modern(name: str) -> str:
    """Files from before 2019, bert-base-uncased among them, call a LayerNorm's weight gamma and its bias beta."""
    return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name))


def check_vocabulary(config: TextConfig | QFormerConfig, entries: int, source: str) -> None:
    """Refuse words of another vocabulary than the model's, with its marks ([DEC] and BLIP's [ENC]) or without."""
    marks = config.vocab_size - config.dec
    if entries not in (config.dec, config.vocab_size):
        beside = "[DEC] and [ENC]" if marks == 2 else "[DEC]"
        raise ModelError(
            f"{source} has {entries} words, the model {config.dec} beside {beside}: "
            f"set text.vocab_size={entries + marks}, and tokenizer to the vocabulary that belongs to it"
        )


def take(tensors: Tensors, wanted: key_maps.Names, source: str) -> Tensors:
    """What is wanted of a checkpoint; all else in it must be known to be of no use here."""
    return key_maps.take({name: t for name, t in tensors.items() if not LEFT_BEHIND.fullmatch(name)}, wanted, source)


@torch.no_grad()
def copy(model: Model, found: Tensors, source: str) -> set[str]:
    """Copy tensors into a model, where the words that only it has stay as they are."""
    own = model.state_dict()
    for name, tensor in found.items():
        of_words = name.endswith("words.weight") or name in ("text.head.weight", "text.head.bias")
        target, rows = own[name], tensor.shape[0] if of_words else own[name].shape[0]
        if tensor.shape != target[:rows].shape:
            raise ModelError(
                f"{source} does not fit the architecture: {name} is {list(target.shape)}, there {list(tensor.shape)}"
            )
        target[:rows] = tensor
    return set(found)


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
