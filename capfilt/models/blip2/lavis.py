"""LAVIS' checkpoints of BLIP-2, in and out: a `.pth` of what was trained, under LAVIS' names.

Such a file mostly lacks the frozen vision tower and the language model, which come from their own checkpoints, and says
nothing of heads and picture sizes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch

from capfilt import config as configs
from capfilt import presets
from capfilt.errors import ModelError
from capfilt.models.blip2 import transformers_config
from capfilt.models.blip2.config import Blip2Config, Format, Kind, LanguageConfig, QFormerConfig
from capfilt.models.blip2.language_model import described_at
from capfilt.models.checkpoints import key_maps, towers
from capfilt.models.checkpoints.files import Tensors
from capfilt.models.checkpoints.fill import distinct_names
from capfilt.models.checkpoints.key_maps import LM_HEAD, TIMM_VISION, WORDS, Table, expand, once
from capfilt.models.interface import Names, OriginalFormat
from capfilt.models.layers.config import Role, VisionConfig
from capfilt.models.registry import blank

TOWER, QFORMER, PREDICTIONS = "visual_encoder.", "Qformer.bert.", "Qformer.cls.predictions."
LANGUAGE: dict[Kind, tuple[str, str]] = {"opt": ("opt_model.", "opt_proj."), "t5": ("t5_model.", "t5_proj.")}
"""What LAVIS calls the language model, and the layer before it."""
ENDS: Table = {"vision_norm.*": "ln_vision.*", "text.norm.*": f"{QFORMER}embeddings.LayerNorm.*"}
COMPARING: Table = {**key_maps.COMPARING, "match_head.*": "itm_head.*", "temperature": "temp"}
NORM_EPS = 1e-5
"""Of the norm behind the frozen tower, in LAVIS."""
VIT_G, BERT_BASE = 1408, 768
"""The widths of which the number of heads is known: EVA's ViT-g has 16, BERT-base 12."""

IGNORED = {
    **towers.POSITION_IDS,
    # LAVIS deletes frozen weights by their first names, and leaves the second ones of tied weights in the file.
    r"t5_model\.(encoder|decoder)\.embed_tokens\.weight|opt_model\.lm_head\.weight": (
        "second names of the frozen language model's words"
    ),
}
KEY_BIASES = "biases of keys in the vision tower, for which LAVIS has no place; softmax does not see them"


def _language_names(config: Blip2Config) -> list[str]:
    return [name for name in distinct_names(blank(config)) if name.startswith("language.")]


class Lavis(OriginalFormat):
    """A `.pth` of LAVIS' Blip2Qformer, Blip2OPT or Blip2T5."""

    name = "BLIP-2's code, LAVIS"
    separate: ClassVar[Mapping[str, str]] = {
        "vision": "a frozen vision tower (eva_vit_g.pth of LAVIS)",
        "language": "a frozen language model (the OPT or Flan-T5 that it was trained with)",
    }

    def lacks(self, tensors: Tensors) -> str:
        wanted = ("query_tokens", f"{QFORMER}encoder.layer.0.attention.self.query.weight")
        return ", ".join(name for name in wanted if name not in tensors)

    def architecture(self, tensors: Tensors, described: Blip2Config | None, source: Path) -> Blip2Config:
        """The architecture of BLIP-2 as released, or as a YAML describes it; what of the language model is tied the
        tensors decide. The biases of queries and values are joined with the zeros of the keys, in place."""
        joined = dict(towers.joined(tensors))
        tensors.clear()
        tensors.update(joined)
        for first, second in ((f"{QFORMER}{WORDS}", "decoder.weight"), (f"{PREDICTIONS}bias", "decoder.bias")):
            if first in tensors and f"{PREDICTIONS}transform.dense.weight" in tensors:
                tensors.setdefault(f"{PREDICTIONS}{second}", tensors[first])
        config = described or from_shapes(tensors, None, source)
        if config.language is None or not _has_language(tensors, config.language.kind):
            return config
        prefix, _ = LANGUAGE[config.language.kind]
        as_tied = config.model_copy(update={"language": config.language.model_copy(update={"tied": True})})
        second_names = {_theirs(name, prefix): _theirs(first, prefix) for name, first in blank(as_tied).tied().items()}
        tied = transformers_config.unify_language(tensors, second_names, prefix)
        return config.model_copy(update={"language": config.language.model_copy(update={"tied": tied})})

    def describe(self, tensors: Tensors, sources: Mapping[str, str], source: Path) -> Blip2Config:
        """The architecture with the language model that its source describes, where no YAML does."""
        language = described_at(sources["language"]) if "language" in sources else None
        return from_shapes(tensors, language, source)

    def names(self, config: Blip2Config) -> Names:
        """What LAVIS calls the tensors of a model of ours; `visual_encoder...attn.qkv.bias` is in two parts there."""
        tower = {ours: theirs for ours, theirs in TIMM_VISION.items() if ours != "norm.*"}
        lines = [
            *expand(tower, config.vision.depth, "vision.", TOWER),
            *expand(ENDS, 1, "", ""),
            ("text.query_tokens", "query_tokens"),
            *transformers_config.layers(config.text, QFORMER),
        ]
        if "encoder" in config.text.roles:
            lines += expand(COMPARING, 1, "", "")
        if config.language is not None:
            model, projection = LANGUAGE[config.language.kind]
            lines += expand({"language_projection.*": f"{projection}*"}, 1, "", "")
            lines += [(ours, _theirs(ours, model)) for ours in _language_names(config)]
        found = once(lines)
        if config.text.roles:
            found["text.words.weight"] = (f"{QFORMER}{WORDS}",)
            found["text.positions.weight"] = (f"{QFORMER}embeddings.position_embeddings.weight",)
        if "decoder" in config.text.roles:
            found |= once(expand(LM_HEAD, 1, "text.head.", PREDICTIONS))
            for ours, again in (("text.words.weight", "decoder.weight"), ("text.head.bias", "decoder.bias")):
                found[ours] = (*found[ours], f"{PREDICTIONS}{again}")
        return found

    def write(self, config: Blip2Config, tensors: Tensors) -> Tensors:
        """Our tensors by the file's names, the constant among its buffers included."""
        given = {theirs: tensors[ours] for ours, several in self.names(config).items() for theirs in several}
        for name in [name for name in given if name.endswith(".attn.qkv.bias")]:
            query, _, value = given.pop(name).chunk(3)
            given[name.replace("qkv.bias", "q_bias")], given[name.replace("qkv.bias", "v_bias")] = query, value
        given[f"{QFORMER}embeddings.position_ids"] = torch.arange(config.text.max_positions)[None]
        return given

    def left_out(self, config: Blip2Config) -> dict[str, int]:
        """The biases of keys, where a tower has them."""
        return {KEY_BIASES: config.vision.depth} if config.vision.key_bias else {}


def _theirs(ours: str, prefix: str) -> str:
    return ours.replace("language.model.", prefix, 1)


def _has_language(tensors: Tensors, kind: Kind) -> bool:
    """Whether a file has a language model, and not only second names that were forgotten in it."""
    prefix, _ = LANGUAGE[kind]
    return any(name.startswith(prefix) and not re.fullmatch([*IGNORED][-1], name) for name in tensors)


# ---- what the shapes say ----


def from_shapes(tensors: Tensors, language: LanguageConfig | None, source: Path) -> Blip2Config:
    """The architecture of a file without a YAML beside it. ModelError for what only a YAML can say."""
    beside = f"write the architecture into {source.stem}.yaml beside it (`capfilt show blip2/pretrain` prints one)"
    kind = next((kind for kind, (_, projection) in LANGUAGE.items() if f"{projection}weight" in tensors), None)
    if kind is not None and (language is None or language.kind != kind):
        if _has_language(tensors, kind):
            raise ModelError(f"{source} has its {kind.upper()} in it, whose heads leave no trace in a file; {beside}")
        tower = "" if f"{TOWER}pos_embed" in tensors else "--vision eva_vit_g.pth "
        raise ModelError(
            f"{source} is of BLIP-2's second stage, and {'lacks' if language is None else 'was trained with'} its "
            f"{kind.upper()}: complete it with `capfilt export {source} --as capfilt {tower}--language FOLDER-OR-NAME "
            f"--out FOLDER` and take that folder, or {beside}"
        )
    with key_maps.fitting(source):
        vision = _vision(tensors, source, beside)
        text = _text(tensors, source, beside, kind)
        return Blip2Config(
            vision=vision,
            text=text,
            projection=tensors["vision_proj.weight"].shape[0] if "vision_proj.weight" in tensors else 256,
            language=language,
            frozen=_held(tensors, kind),
            vision_norm_eps=NORM_EPS,
        )


def _vision(tensors: Tensors, source: Path, beside: str) -> VisionConfig:
    (width,) = tensors["ln_vision.weight"].shape
    if f"{TOWER}ln_pre.weight" in tensors or width == 1024:
        raise ModelError(f"{source} stands behind CLIP's ViT-L, which has a norm before its blocks: only EVA's is read")
    if width != VIT_G:
        raise ModelError(f"{source}: its tower is {width} wide, and heads leave no trace in a file; {beside}")
    published = configs.read(presets.find("models", "blip2/pretrain"), Blip2Config).vision
    if f"{TOWER}pos_embed" not in tensors:
        return published
    side = math.isqrt(tensors[f"{TOWER}pos_embed"].shape[1] - 1)
    depth = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith(f"{TOWER}blocks."))
    size = side * tensors[f"{TOWER}patch_embed.proj.weight"].shape[-1]  # 364 after a fine-tuning on COCO
    return published.model_copy(update={"image_size": size, "depth": depth})


def _text(tensors: Tensors, source: Path, beside: str, kind: Kind | None) -> QFormerConfig:
    _, queries, width = tensors["query_tokens"].shape
    if width != BERT_BASE:
        raise ModelError(f"{source}: its Q-Former is {width} wide, and heads leave no trace in a file; {beside}")
    numbers = {
        part: sorted({int(name.split(".")[4]) for name in tensors if re.match(rf".*layer\.\d+\.{part}\.", name)})
        for part in ("attention", "crossattention")
    }
    crossing, roles = numbers["crossattention"], list[Role]()
    if kind is None:
        roles += ["encoder"] if "vision_proj.weight" in tensors else []
        roles += ["decoder"] if f"{PREDICTIONS}bias" in tensors else []
    elif f"{QFORMER}{WORDS}" in tensors:
        raise ModelError(f"{source} reads instructions in its Q-Former (InstructBLIP); of LAVIS BLIP-2 is read")
    words = tensors[f"{QFORMER}{WORDS}"].shape[0] if roles else 30523
    positions = tensors[f"{QFORMER}embeddings.position_embeddings.weight"].shape[0] if roles else 512
    return QFormerConfig(
        vocab_size=words,
        width=width,
        depth=len(numbers["attention"]),
        heads=12,
        hidden=tensors[f"{QFORMER}encoder.layer.0.intermediate_query.dense.weight"].shape[0],
        max_positions=positions,
        queries=queries,
        cross_every=crossing[1] if len(crossing) > 1 else len(numbers["attention"]),
        roles=tuple(roles),
    )


def _held(tensors: Tensors, kind: Kind | None) -> Format:
    """In which format to hold the frozen towers: that of the file; bf16 where it has none, and of a T5 in fp16."""
    tower = tensors.get(f"{TOWER}patch_embed.proj.weight")
    formats: dict[torch.dtype, Format] = {torch.float32: "fp32", torch.float16: "bf16" if kind == "t5" else "fp16"}
    return "bf16" if tower is None else formats.get(tower.dtype, "bf16")
