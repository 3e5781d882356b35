"""One key map per outside checkpoint: how transformers' BLIP classes and BLIP's own `.pth` files name our tensors.

A map is a table that is read in both directions, `{n}` standing for a layer and `*` for weight and bias. What a file
names twice (BLIP writes the parts that encoder and decoder share under both) is one tensor here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from capfilt.errors import ModelError
from capfilt.models.blip.model import BlipConfig
from capfilt.models.checkpoints.files import Tensors
from capfilt.models.layers.bert import APART, Role, Share, TextConfig
from capfilt.models.layers.vit import VisionConfig

Layout = Literal["hf", "pth"]
Names = dict[str, tuple[str, ...]]
"""Our name of a tensor -> every name that it has in a file."""
Table = Mapping[str, str]

TIMM_VISION: Table = {
    "cls": "cls_token",
    "positions": "pos_embed",
    "patches.*": "patch_embed.proj.*",
    "blocks.{n}.attention_norm.*": "blocks.{n}.norm1.*",
    "blocks.{n}.attention.qkv.*": "blocks.{n}.attn.qkv.*",
    "blocks.{n}.attention.out.*": "blocks.{n}.attn.proj.*",
    "blocks.{n}.feed_forward_norm.*": "blocks.{n}.norm2.*",
    "blocks.{n}.feed_forward.up.*": "blocks.{n}.mlp.fc1.*",
    "blocks.{n}.feed_forward.down.*": "blocks.{n}.mlp.fc2.*",
    "norm.*": "norm.*",
}
HF_VISION: Table = {
    "cls": "embeddings.class_embedding",
    "positions": "embeddings.position_embedding",
    "patches.*": "embeddings.patch_embedding.*",
    "blocks.{n}.attention_norm.*": "encoder.layers.{n}.layer_norm1.*",
    "blocks.{n}.attention.qkv.*": "encoder.layers.{n}.self_attn.qkv.*",
    "blocks.{n}.attention.out.*": "encoder.layers.{n}.self_attn.projection.*",
    "blocks.{n}.feed_forward_norm.*": "encoder.layers.{n}.layer_norm2.*",
    "blocks.{n}.feed_forward.up.*": "encoder.layers.{n}.mlp.fc1.*",
    "blocks.{n}.feed_forward.down.*": "encoder.layers.{n}.mlp.fc2.*",
    "norm.*": "post_layernorm.*",
}
VISION: dict[Layout, tuple[str, Table]] = {
    "hf": ("vision_model.", HF_VISION),
    "pth": ("visual_encoder.", TIMM_VISION),
}


def _attention(theirs: str) -> Table:
    layer = f"encoder.layer.{{n}}.{theirs}"
    inner = {f"block.{part}.*": f"{layer}.self.{part}.*" for part in ("query", "key", "value")}
    return {**inner, "block.out.*": f"{layer}.output.dense.*", "norm.*": f"{layer}.output.LayerNorm.*"}


BERT: dict[str, Table] = {
    "embeddings": {
        "words.weight": "embeddings.word_embeddings.weight",
        "positions.weight": "embeddings.position_embeddings.weight",
        "norm.*": "embeddings.LayerNorm.*",
    },
    "self_attention": _attention("attention"),
    "cross_attention": _attention("crossattention"),
    "feed_forward": {
        "block.up.*": "encoder.layer.{n}.intermediate.dense.*",
        "block.down.*": "encoder.layer.{n}.output.dense.*",
        "norm.*": "encoder.layer.{n}.output.LayerNorm.*",
    },
}
"""The parts of a text stack; BERT, BLIP and transformers agree on them."""
LM_HEAD: Table = {"bias": "bias", "transform.*": "transform.dense.*", "norm.*": "transform.LayerNorm.*"}
COMPARING: Table = {
    "image_projection.*": "vision_proj.*",
    "text_projection.*": "text_proj.*",
    "match_head.*": "itm_head.*",
}

STACKS: dict[str, str] = {"encoder": "text_encoder.", "decoder": "text_decoder.bert."}
PREDICTIONS = "text_decoder.cls.predictions."
WORDS = "embeddings.word_embeddings.weight"
OUTPUT = f"{PREDICTIONS}decoder.weight"

IGNORED = {
    r"(visual_encoder|text_encoder|vision_proj|text_proj)_m\..*": "the momentum copies, which only training needs",
    r"image_queue|text_queue|idx_queue|queue_ptr|ptr_queue": "the queues of ITC, which only training needs",
    r".*embeddings\.position_ids": "a constant, 0, 1, 2, ...",
}
"""Keys that are left behind on purpose, and why."""


def names(config: BlipConfig, layout: Layout) -> Names:
    """What a file of that layout calls the tensors of a model of ours. The temperature of ITC has no place in "hf"."""
    prefix, table = VISION[layout]
    lines = [*expand(table, config.vision.depth, "vision.", prefix)]
    if "decoder" in config.text.roles:
        lines += expand(LM_HEAD, 1, "text.head.", PREDICTIONS)
        if not config.text.tie_lm_head:
            lines.append(("text.head.weight", OUTPUT))
    if "encoder" in config.text.roles and not config.answers:
        lines += expand(COMPARING, 1, "", "")
        if layout == "pth":
            lines.append(("temperature", "temp"))
    return once(lines) | text_names(config.text, STACKS)


def once(lines: Iterable[tuple[str, str]]) -> Names:
    """Names of tensors that have one name each."""
    return {ours: (theirs,) for ours, theirs in lines}


def text_names(config: TextConfig, stacks: Mapping[str, str], parts: Iterable[str] = tuple(BERT)) -> Names:
    """What each stack calls the parts of ours; a part that both roles use has a name in both stacks."""
    found: Names = {}
    for part in parts:
        owners = config.roles if part in APART[config.share] else ("shared",)
        for owner in owners:
            place = "embeddings" if part == "embeddings" else f"layers.{{n}}.{part}"
            for role in config.roles if owner == "shared" else (owner,):
                for ours, theirs in expand(BERT[part], config.depth, f"text.{place}.{owner}.", stacks[role]):
                    found[ours] = (*found.get(ours, ()), theirs)
    return found


def expand(table: Table, depth: int, ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    """The lines of a table for every layer, weight and bias, with prefixes."""
    for left, right in ((ours + left, theirs + right) for left, right in table.items()):
        for n in range(depth) if "{n}" in left else (0,):
            for ending in ("weight", "bias") if left.endswith("*") else ("",):
                yield left.format(n=n).replace("*", ending), right.format(n=n).replace("*", ending)


def take(tensors: Tensors, wanted: Names, source: object) -> Tensors:
    """A file's tensors by our names. Every key of the file is used, or is in IGNORED.

    Raises:
        ModelError: keys that are missing or unexpected, or one tensor of ours that has two values there.
    """
    theirs = {name for several in wanted.values() for name in several}
    missing = sorted(theirs - tensors.keys())
    unexpected = sorted(name for name in tensors.keys() - theirs if not why_ignored(name))
    differ = [] if missing else sorted(ours for ours, several in wanted.items() if not _equal(tensors, several))
    refuse(source, [("missing", missing), ("unexpected", unexpected), ("of two values", differ)])
    return {ours: tensors[several[0]] for ours, several in wanted.items()}


def take_momentum(tensors: Tensors, config: BlipConfig, source: object) -> Tensors:
    """The momentum encoders and the queues, [size, projection], that a `.pth` of BLIP's pretraining carries.

    Heads and temperature have no momentum copy there.

    Raises:
        ModelError: keys that are missing.
    """
    theirs = {
        ours: re.sub(r"^(visual_encoder|text_encoder|vision_proj|text_proj)\.", r"\1_m.", several[0])
        for ours, several in names(config, "pth").items()
    }
    theirs = {ours: name for ours, name in theirs.items() if re.match(r"\w+_m\.", name)}
    wanted = once([*theirs.items(), ("queue_image", "image_queue"), ("queue_text", "text_queue")])
    missing = sorted({name for several in wanted.values() for name in several} - tensors.keys())
    refuse(source, [("missing", missing)])
    found = {ours: tensors[several[0]] for ours, several in wanted.items()}
    return {name: t.T.contiguous() if name.startswith("queue_") else t for name, t in found.items()}


def refuse(source: object, faults: Iterable[tuple[str, list[str]]]) -> None:
    """Raise ModelError with the first names of every fault, if there is one."""
    told = "; ".join(
        f"{len(keys)} {kind}: {', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''}" for kind, keys in faults if keys
    )
    if told:
        raise ModelError(f"{source} does not fit the architecture: {told}")


def why_ignored(name: str) -> str:
    """Why a key is left behind on purpose, or ""."""
    return next((why for pattern, why in IGNORED.items() if re.fullmatch(pattern, name)), "")


def settle_head(tensors: Tensors) -> bool:
    """Bring the LM head of a file to one form, in place; say whether its output matrix is the word embeddings.

    The files name its bias once or twice; both codes add `decoder.bias`, which is left under the name `bias`. An output
    matrix that equals the word embeddings is taken out. Whether released checkpoints are tied is nowhere written down,
    so the tensors decide.
    """
    if (bias := tensors.pop(f"{PREDICTIONS}decoder.bias", None)) is not None:
        tensors[f"{PREDICTIONS}bias"] = bias
    weight = tensors.get(OUTPUT)
    words = tensors.get(STACKS["decoder"] + WORDS)
    if weight is None or words is None:
        return weight is None
    if tied := torch.equal(weight, words):
        del tensors[OUTPUT]
    return tied


def give(tensors: Tensors, config: BlipConfig, layout: Layout) -> Tensors:
    """Our tensors by a file's names, everything that its own code expects included."""
    given = {theirs: tensors[ours] for ours, several in names(config, layout).items() for theirs in several}
    if "decoder" in config.text.roles:
        bias = given[f"{PREDICTIONS}bias"]
        # transformers ties the second names itself and does not save them; BLIP's files have them.
        if layout == "pth" or not config.text.tie_lm_head:
            given[f"{PREDICTIONS}decoder.bias"] = bias
        if layout == "pth" and config.text.tie_lm_head:
            given[OUTPUT] = given[STACKS["decoder"] + WORDS]
    return given


def from_shapes(tensors: Tensors, source: object) -> BlipConfig:
    """The architecture of a `.pth` of BLIP's, which says nothing about it; its LM head is settled.

    Heads leave no trace in the shapes: they are 64 wide in every released checkpoint.
    """
    try:
        return _from_shapes(tensors, source)
    except KeyError as error:
        raise ModelError(f"{source} does not fit any architecture: {error.args[0]} is missing") from None
    except (ValueError, IndexError) as error:  # tensors of impossible shapes; pydantic's errors are ValueErrors
        why = " ".join(str(error).split())[:200]
        raise ModelError(f"{source} does not fit any architecture: {why}") from None


def _from_shapes(tensors: Tensors, source: object) -> BlipConfig:
    roles: tuple[Role, ...] = tuple(role for role in get_args(Role) if STACKS[role] + WORDS in tensors)
    if not roles or "visual_encoder.pos_embed" not in tensors:
        raise ModelError(
            f"{source} is no checkpoint of BLIP: it lacks visual_encoder.pos_embed, or both of "
            f"{' and '.join(stack + WORDS for stack in STACKS.values())}"
        )
    stack = STACKS[roles[-1]]
    patch = tensors["visual_encoder.patch_embed.proj.weight"].shape[-1]
    tokens, vision_width = tensors["visual_encoder.pos_embed"].shape[1:]
    vocab_size, width = tensors[stack + WORDS].shape
    for tower, size in (("vision", vision_width), ("text", width)):
        if size % 64:
            raise ModelError(
                f"{source}: its {tower} is {size} wide, not a multiple of 64, and a .pth does not say how many heads "
                f"it has; write the architecture into a YAML of the same name beside it"
            )
    projection = tensors["vision_proj.weight"].shape[0] if "vision_proj.weight" in tensors else 256
    return BlipConfig(
        vision=VisionConfig(
            image_size=math.isqrt(tokens - 1) * patch,
            patch_size=patch,
            width=vision_width,
            depth=_depth(tensors, "visual_encoder.blocks."),
            heads=vision_width // 64,
            hidden=tensors["visual_encoder.blocks.0.mlp.fc1.weight"].shape[0],
        ),
        text=TextConfig(
            vocab_size=vocab_size,
            width=width,
            depth=_depth(tensors, f"{stack}encoder.layer."),
            heads=width // 64,
            hidden=tensors[f"{stack}encoder.layer.0.intermediate.dense.weight"].shape[0],
            max_positions=tensors[f"{stack}embeddings.position_embeddings.weight"].shape[0],
            share=shared(tensors) if len(roles) == 2 else "all_but_self_attention",
            roles=roles,
            tie_lm_head=OUTPUT not in tensors,
        ),
        projection=projection,
        answers=len(roles) == 2 and "itm_head.weight" not in tensors,
    )


def shared(tensors: Tensors) -> Share:
    """Which way of sharing the values of both stacks allow: the one that keeps the fewest parts apart."""
    apart = frozenset(part for part, table in BERT.items() if _differ(tensors, table))
    return next(share for share, own in sorted(APART.items(), key=lambda item: len(item[1])) if apart <= own)


def _differ(tensors: Tensors, table: Table) -> bool:
    depth = _depth(tensors, f"{STACKS['decoder']}encoder.layer.")
    stems = [theirs for _, theirs in expand(table, depth, "", "")]
    return not all(_equal(tensors, [stack + stem for stack in STACKS.values()]) for stem in stems)


def _equal(tensors: Tensors, several: Iterable[str]) -> bool:
    first, *others = (tensors.get(name) for name in several)
    return all(a is first or (a is not None and first is not None and torch.equal(first, a)) for a in others)


def _depth(tensors: Mapping[str, Tensor], prefix: str) -> int:
    numbers = {int(name.removeprefix(prefix).partition(".")[0]) for name in tensors if name.startswith(prefix)}
    return max(numbers, default=-1) + 1
