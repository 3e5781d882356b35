"""A folder of transformers: its `config.json`, and what several families' descriptions have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from capfilt.errors import ModelError
from capfilt.models.layers.config import BertConfig, VisionConfig
from capfilt.storage.documents import read_model_object

CONFIG = "config.json"
STACK = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "layer_norm_eps": "layer_norm_eps",
}
TEXT = STACK | {
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
    "dropout": "hidden_dropout_prob",
}
"""Fields of our stacks, of any and of one like BERT's -> what transformers' `config.json` calls them."""


def read(folder: Path, classes: Sequence[str]) -> dict[str, Any]:
    """The `config.json` of a folder; ModelError unless it is of one of these classes of transformers."""
    path = folder / CONFIG
    try:
        config = read_model_object(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error})") from None
    named = config.get("architectures")
    declared = str(named[0])[:100] if isinstance(named, list) and named else "none"
    for part in ("vision_config", "text_config", "qformer_config"):
        if not isinstance(config.get(part) or {}, dict):
            raise ModelError(f"{path}: {part} is a {type(config[part]).__name__}, and not an object")
    if declared not in classes:
        raise ModelError(
            f"{path} describes the class {declared}; of transformers' classes these can be read: {', '.join(classes)}"
        )
    return dict(config)


@contextmanager
def possible(source: Path, what: str = CONFIG) -> Iterator[None]:
    """Tell of a description that no model can have in one line: ModelError; `what` describes it."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in first["loc"])
        raise ModelError(f"{source}: its {what} describes no possible model: {where}{first['msg']}") from None
    except (KeyError, ValueError, TypeError, ArithmeticError) as error:
        why = " ".join(str(error).split())[:200]
        raise ModelError(f"{source}: its {what} describes no possible model: {why}") from None


def vision_tower(vision: Mapping[str, Any], source: Path, **more: bool) -> VisionConfig:
    """The vision tower that a `vision_config` describes; `more` is what the family's towers have in common."""
    return VisionConfig(
        image_size=square(vision, "image_size", source),
        patch_size=square(vision, "patch_size", source),
        **{ours: vision[theirs] for ours, theirs in STACK.items()},
        **more,
    )


def described_vision(vision: VisionConfig, model_type: str) -> dict[str, Any]:
    """The `vision_config` of a tower of ours."""
    return {
        "model_type": model_type,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_act": "gelu",
        **{theirs: getattr(vision, ours) for ours, theirs in STACK.items()},
    }


def text_fields(text: Mapping[str, Any]) -> dict[str, Any]:
    """What a `text_config` or `qformer_config` says of a stack like BERT's, by the fields of ours."""
    return {ours: text[theirs] for ours, theirs in TEXT.items()}


def described_text(text: BertConfig) -> dict[str, Any]:
    """The other way."""
    described = {theirs: getattr(text, ours) for ours, theirs in TEXT.items()}
    return {**described, "hidden_act": "gelu", "attention_probs_dropout_prob": text.dropout}


def check_gelu(sections: Mapping[str, Mapping[str, Any]], family: str, source: Path) -> None:
    """Refuse sections of a description with another activation than the family has; ModelError."""
    for section, part in sections.items():
        if part["hidden_act"] != "gelu":
            raise ModelError(
                f"{source}: {section}.hidden_act is {part['hidden_act']}; {family} has gelu, and so has this code"
            )


def square(part: Mapping[str, Any], name: str, source: Path) -> int:
    """A size that may be written as a number or as two equal ones."""
    sides = part[name] if isinstance(part[name], list) else [part[name]]
    if len(set(sides)) != 1:
        raise ModelError(f"{source}: {name} is {sides}; pictures and patches must be square")
    return int(sides[0])
