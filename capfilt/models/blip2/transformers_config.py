"""transformers' BLIP-2 classes: their `config.json` read into an architecture of ours and written from one; names.

`Blip2ForImageTextRetrieval` is a model of stage 1 without its LM head, and without a place for the temperature of ITC;
`Blip2ForConditionalGeneration` is one of stage 2, its language model included.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capfilt.errors import ModelError
from capfilt.models.blip2.config import Blip2Config, Format, Kind, LanguageConfig, QFormerConfig
from capfilt.models.checkpoints.key_maps import BERT, HF_VISION, LM_HEAD, Table, expand, once
from capfilt.models.checkpoints.transformers_folder import (
    check_gelu,
    described_text,
    described_vision,
    text_fields,
    vision_tower,
)
from capfilt.models.interface import Names

FILTER, CAPTIONER = "Blip2ForImageTextRetrieval", "Blip2ForConditionalGeneration"

# The defaults of transformers 5.23.0.
_VISION: dict[str, Any] = {
    "hidden_size": 1408,
    "intermediate_size": 6144,
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
}
_QFORMER: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
    "cross_attention_frequency": 2,
}
FORMATS: dict[Format, str] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_NOT_SETTINGS = ("architectures", "dtype", "model_type", "torch_dtype", "transformers_version", "_name_or_path")


WORDS: Table = {
    "words.weight": "embeddings.word_embeddings.weight",
    "positions.weight": "embeddings.position_embeddings.weight",
}
COMPARING: Table = {
    "image_projection.*": "vision_projection.*",
    "text_projection.*": "text_projection.*",
    "match_head.*": "itm_head.*",
}


def names(config: Blip2Config, language: Iterable[str]) -> Names:
    """What transformers calls the tensors of a model of ours; `language` are the language model's own names.

    The head that writes in stage 1 (`LM_HEAD`) and the temperature have no place there.
    """
    vision = {ours: theirs for ours, theirs in HF_VISION.items() if ours != "norm.*"}
    lines = [
        *expand(vision, config.vision.depth, "vision.", "vision_model."),
        *expand({"vision_norm.*": "vision_model.post_layernorm.*", "text.norm.*": "qformer.layernorm.*"}, 1, "", ""),
        ("text.query_tokens", "query_tokens"),
        *((ours, theirs.replace(".self.", ".attention.")) for ours, theirs in layers(config.text, "qformer.")),
    ]
    if config.text.roles:
        lines += expand(WORDS, 1, "text.", "")
    if "encoder" in config.text.roles:
        lines += expand(COMPARING, 1, "", "")
    if config.language is not None:
        lines += expand({"language_projection.*": "language_projection.*"}, 1, "", "")
        lines += [(f"language.{name}", renamed(f"language.{name}")) for name in language]
    return once(lines)


def renamed(ours: str) -> str:
    """What transformers calls a tensor of the language model."""
    return ours.replace("language.model.", "language_model.", 1)


def layers(config: QFormerConfig, prefix: str) -> Iterator[tuple[str, str]]:
    """The Q-Former's layers behind a prefix: BERT's names, and `_query` in those of the feed-forward of queries."""
    of_queries = {
        ours: theirs.replace("}.intermediate.", "}.intermediate_query.").replace("}.output.", "}.output_query.")
        for ours, theirs in BERT["feed_forward"].items()
    }
    parts = {"self_attention": BERT["self_attention"], "query_feed_forward": of_queries}
    if config.roles:
        parts["feed_forward"] = BERT["feed_forward"]
    for part, table in parts.items():
        yield from expand(table, config.depth, f"text.layers.{{n}}.{part}.", prefix)
    for ours, theirs in expand(BERT["cross_attention"], config.depth, "text.layers.{n}.cross_attention.", prefix):
        if int(ours.split(".")[2]) % config.cross_every == 0:
            yield ours, theirs


NO_PLACE = "the head that writes in stage 1, for which transformers has no place"


def left_out(config: Blip2Config) -> dict[str, int]:
    """How many tensors of a model of ours are left behind in transformers' layout, by the reason."""
    head = [*expand(LM_HEAD, 1, "text.head.", "")] if "decoder" in config.text.roles else []
    return {NO_PLACE: len(head)} if head else {}


def unify_language(tensors: dict[str, Tensor], second: Mapping[str, str], prefix: str = "language_model.") -> bool:
    """Bring a language model's tensors to one name each, in place; say whether its output matrix is its words.

    `second` are the second names in such a file, of a model that is tied, and the first ones. Files may have both.
    """
    output = f"{prefix}lm_head.weight"
    words = tensors.get(second.get(output, ""))
    tied = output not in tensors or (words is not None and torch.equal(tensors[output], words))
    for name, first in second.items():
        if name != output and name in tensors and first not in tensors:
            tensors[first] = tensors[name]
        if (name != output or tied) and name in tensors and torch.equal(tensors[name], tensors[first]):
            del tensors[name]
    return tied


def architecture(config: Mapping[str, Any], tied: bool, source: Path) -> Blip2Config:
    """What a `config.json` describes; `tied` is what the tensors say of the language model."""
    vision = _VISION | (config.get("vision_config") or {})
    text = _QFORMER | (config.get("qformer_config") or {})
    check_gelu({"vision_config": vision, "qformer_config": text}, "BLIP-2", source)
    if not vision.get("qkv_bias", True):
        raise ModelError(
            f"{source}: vision_config.qkv_bias is false; BLIP-2's towers have biases, and so has this code"
        )
    is_filter = config["architectures"][0] == FILTER
    reads = text.get("use_qformer_text_input", text.get("qformer_text_input", is_filter))  # older files: the second
    if reads != is_filter:
        raise ModelError(
            f"{source}: use_qformer_text_input is {reads}; {FILTER} reads texts in the Q-Former, {CAPTIONER} does not"
        )
    held = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    language = None if is_filter else language_of(config, tied, source)
    if language is not None and language.kind == "t5" and held == "float16":
        held = "bfloat16"  # T5 overflows in fp16; transformers keeps half of it in float32 there
    return Blip2Config(
        vision=vision_tower(vision, source, key_bias=False, final_norm=False),
        vision_norm_eps=config.get("vision_norm_eps"),
        text=QFormerConfig(
            **text_fields(text),
            queries=config.get("num_query_tokens", 32),
            cross_every=text["cross_attention_frequency"],
            roles=("encoder",) if is_filter else (),
        ),
        projection=config.get("image_text_hidden_size", 256),
        temperature=config.get("itc_temperature", 0.07),
        language=language,
        frozen=next((ours for ours, theirs in FORMATS.items() if theirs == held), "fp32"),
    )


def language_of(config: Mapping[str, Any], tied: bool, source: Path) -> LanguageConfig:
    """The language model that a `text_config` describes; `tied` is what the tensors say."""
    text = dict(config.get("text_config") or {"model_type": "opt"})
    kind: Kind
    width: tuple[str, ...]
    match text.get("model_type"):
        case "opt":
            kind, width = "opt", ("hidden_size", "word_embed_proj_dim")
        case "t5":
            kind, width = "t5", ("d_model",)
        case other:
            raise ModelError(f"{source}: its language model is a {other}; there are opt and t5")
    given = {name: value for name, value in text.items() if name not in _NOT_SETTINGS}
    full = LanguageConfig(kind=kind, settings={k: v for k, v in given.items() if _plain(v)}).described().to_dict()
    default = LanguageConfig(kind=kind, settings={"use_cache": True}).described().to_dict()
    wanted = {name: full[name] for name in given if name in full and _plain(full[name])}
    settings = {name: value for name, value in wanted.items() if value != default.get(name, full) or name in width}
    if kind == "t5" and not full["scale_decoder_outputs"]:
        # transformers keeps of `tie_word_embeddings: false`, as Flan-T5 has it, that logits are not scaled.
        settings["tie_word_embeddings"] = False
    return LanguageConfig(
        kind=kind,
        settings=settings | {name: full[name] for name in width},
        tied=tied,
        image_token=config.get("image_token_index"),
    )


def _plain(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def class_of(config: Blip2Config) -> str:
    """The class of transformers that a model of ours can be; ModelError where there is none."""
    if config.language is not None:
        return CAPTIONER
    if config.text.roles == ("encoder",):
        return FILTER
    raise ModelError(
        f"transformers has no class for a Q-Former that writes: leave that out (text.roles=[encoder]) for {FILTER}"
    )


def describe(config: Blip2Config, temperature: float) -> dict[str, Any]:
    """The `config.json` of a model of ours."""
    vision, text, language = config.vision, config.text, config.language
    described: dict[str, Any] = {
        "architectures": [class_of(config)],
        "model_type": "blip-2",
        "dtype": FORMATS[config.frozen],  # transformers keeps the Q-Former in float32 whatever stands here
        "image_text_hidden_size": config.projection,
        "num_query_tokens": text.queries,
        "itc_temperature": temperature,
        "vision_config": {**described_vision(vision, "blip_2_vision_model"), "qkv_bias": True},
        "qformer_config": {
            "model_type": "blip_2_qformer",
            **described_text(text),
            "cross_attention_frequency": text.cross_every,
            "encoder_hidden_size": vision.width,
            "use_qformer_text_input": bool(text.roles),
        },
    }
    if config.vision_norm_eps is not None:  # transformers has the tower's, and passes over this
        described["vision_norm_eps"] = config.vision_norm_eps
    if language is not None:
        described["text_config"] = {"model_type": language.kind, **language.settings}
        described["image_token_index"] = language.for_images
    return described
