"""The `config.json` of transformers' BLIP classes, read into an architecture of ours and written from one.

What such a file does not say has transformers' defaults, and these are not BLIP's: 8 text heads, not 12; a vision
LayerNorm eps of 1e-5, not 1e-6; no dropout. None of its classes is a pretrained model, with all that BLIP pretrains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from capfilt.errors import ModelError
from capfilt.models.blip.config import BlipConfig
from capfilt.models.checkpoints.transformers_folder import (
    check_gelu,
    described_text,
    described_vision,
    text_fields,
    vision_tower,
)
from capfilt.models.layers.config import Role, TextConfig

HfClass = Literal["BlipForConditionalGeneration", "BlipForImageTextRetrieval", "BlipForQuestionAnswering"]
ROLES: dict[HfClass, tuple[Role, ...]] = {
    "BlipForConditionalGeneration": ("decoder",),
    "BlipForImageTextRetrieval": ("encoder",),
    "BlipForQuestionAnswering": ("encoder", "decoder"),
}
"""The classes of transformers that are models of ours."""

# The defaults of transformers 5.23.0.
_VISION: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 384,
    "patch_size": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}
_TEXT: dict[str, Any] = {
    "vocab_size": 30524,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.0,
    "bos_token_id": 30522,
}


def declares_tied(config: Mapping[str, Any]) -> bool:
    """Whether transformers would tie the LM head where the file has no output matrix: either of two flags does."""
    return any(part.get("tie_word_embeddings", True) for part in (config, config.get("text_config") or {}))


def architecture(config: Mapping[str, Any], tied: bool, source: Path) -> BlipConfig:
    """What a `config.json` describes; `tied` is what the tensors say of the LM head."""
    roles = ROLES[config["architectures"][0]]
    vision = _VISION | (config.get("vision_config") or {})
    text = _TEXT | (config.get("text_config") or {})
    check_gelu({"vision_config": vision, "text_config": text}, "BLIP", source)
    if "decoder" in roles and text["bos_token_id"] != text["vocab_size"] - 2:
        raise ModelError(
            f"{source}: text_config.bos_token_id is {text['bos_token_id']}; [DEC] and [ENC] must be the last two of "
            f"the {text['vocab_size']} entries"
        )
    return BlipConfig(
        vision=vision_tower(vision, source),
        text=TextConfig(
            **text_fields(text),
            share="none" if len(roles) == 2 else "all_but_self_attention",
            roles=roles,
            tie_lm_head=tied,
        ),
        projection=config.get("image_text_hidden_size", 256),
        temperature=math.exp(-config.get("logit_scale_init_value", 2.6592)),
        itm_token=config.get("itm_token", "enc"),
        answers=len(roles) == 2,
    )


def class_of(config: BlipConfig) -> HfClass:
    """The class of transformers that a model of ours can be; ModelError where there is none."""
    if len(config.text.roles) == 2 and not config.answers:
        raise ModelError(
            "transformers has no class for a model of both roles: give it the captioner and the filter apart"
        )
    return next(name for name, roles in ROLES.items() if set(roles) == set(config.text.roles))


def describe(config: BlipConfig, temperature: float, special: Mapping[str, int]) -> dict[str, Any]:
    """The `config.json` of a model of ours.

    Args:
        temperature: of ITC; transformers' classes have no place for it but `logit_scale_init_value`.
        special: the ids of "pad" and "sep".
    """
    vision, text = config.vision, config.text
    return {
        "architectures": [class_of(config)],
        "model_type": "blip",
        "dtype": "float32",
        "image_text_hidden_size": config.projection,
        "logit_scale_init_value": -math.log(temperature),
        "tie_word_embeddings": text.tie_lm_head,
        "itm_token": config.itm_token,
        "vision_config": described_vision(vision, "blip_vision_model"),
        "text_config": {
            "model_type": "blip_text_model",
            **described_text(text),
            "encoder_hidden_size": vision.width,
            "is_decoder": True,
            "tie_word_embeddings": text.tie_lm_head,
            "bos_token_id": text.dec,
            "eos_token_id": special["sep"],
            "sep_token_id": special["sep"],
            "pad_token_id": special["pad"],
        },
    }
