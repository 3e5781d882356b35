"""How checkpoints of other code name our tensors: the tables of the towers, and what reads and writes with them.

A map is a table that is read in both directions, `{n}` standing for a layer and `*` for weight and bias. What a file
names twice (BLIP writes the parts that encoder and decoder share under both) is one tensor here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from capfilt.errors import ModelError
from capfilt.models.checkpoints.files import Tensors
from capfilt.models.layers.config import APART, FusionTextConfig, TextConfig

if TYPE_CHECKING:
    from torch import Tensor

    from capfilt.models.interface import Names

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
"""The vision tower of timm, DeiT and BLIP's own code."""
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
"""The vision tower of transformers' BLIP and BLIP-2."""


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
EMBEDDINGS: Table = {
    **{ours: theirs.removeprefix("embeddings.") for ours, theirs in BERT["embeddings"].items()},
    "types.weight": "token_type_embeddings.weight",
}
MLM_HEAD: Table = {
    "mlm_head.transform.*": "mlm_score.transform.dense.*",
    "mlm_head.norm.*": "mlm_score.transform.LayerNorm.*",
    "mlm_head.bias": "mlm_score.bias",
    "mlm_head.weight": "mlm_score.decoder.weight",
}
"""BERT's embeddings with token types, and its head, in the codes of ViLT and VLMo."""
LM_HEAD: Table = {"bias": "bias", "transform.*": "transform.dense.*", "norm.*": "transform.LayerNorm.*"}
WORDS = "embeddings.word_embeddings.weight"
TYPES = "embeddings.token_type_embeddings.weight"
COMPARING: Table = {"image_projection.*": "vision_proj.*", "text_projection.*": "text_proj.*"}
"""The heads that compare, in the codes of BLIP, ALBEF and X-VLM."""
NOT_MODEL = {
    r"(visual_encoder|text_encoder|vision_proj|text_proj)_m\..*": "the momentum copies, which only training needs",
    r"image_queue|text_queue|idx_queue|queue_ptr|ptr_queue": "the queues of ITC, which only training needs",
    r".*embeddings\.position_ids": "a constant, 0, 1, 2, ...",
}
"""Keys of the files of BLIP and ALBEF that are left behind on purpose, and why."""


def once(lines: Iterable[tuple[str, str]]) -> Names:
    """Names of tensors that have one name each."""
    return {ours: (theirs,) for ours, theirs in lines}


def text_names(
    config: TextConfig | FusionTextConfig, stacks: Mapping[str, str], parts: Iterable[str] = tuple(BERT)
) -> Names:
    """What each stack calls the parts of ours; a part that both roles use has a name in both stacks."""
    names: Names = {}
    for part in parts:
        owners = config.roles if part in APART[config.share] else ("shared",)
        first = config.fusion_layer if part == "cross_attention" else 0
        for owner in owners:
            place = "embeddings" if part == "embeddings" else f"layers.{{n}}.{part}"
            types = {"types.weight": TYPES} if part == "embeddings" and config.token_types else {}
            table = {**BERT[part], **types}
            for role in config.roles if owner == "shared" else (owner,):
                for ours, theirs in expand(table, config.depth, f"text.{place}.{owner}.", stacks[role], first):
                    if theirs not in names.get(ours, ()):
                        names[ours] = (*names.get(ours, ()), theirs)
    return names


def expand(table: Table, depth: int, ours: str, theirs: str, first: int = 0) -> Iterator[tuple[str, str]]:
    """The lines of a table for every layer from the `first`, weight and bias, with prefixes."""
    for left, right in ((ours + left, theirs + right) for left, right in table.items()):
        for n in range(first, depth) if "{n}" in left else (0,):
            for ending in ("weight", "bias") if left.endswith("*") else ("",):
                yield left.format(n=n).replace("*", ending), right.format(n=n).replace("*", ending)


def unify_head(tensors: Tensors, predictions: str, words: str) -> bool:
    """Bring BERT's head in a file to one form, in place; say whether its output matrix is the word embeddings.

    The files name its bias once or twice; the codes add `decoder.bias`, which is left under the name `bias`. An output
    matrix that equals the word embeddings is taken out. Whether released checkpoints are tied is nowhere written down,
    so the tensors decide.
    """
    if (bias := tensors.pop(f"{predictions}decoder.bias", None)) is not None:
        tensors[f"{predictions}bias"] = bias
    weight = tensors.get(f"{predictions}decoder.weight")
    if weight is None or words not in tensors:
        return weight is None
    if tied := equal(tensors, [f"{predictions}decoder.weight", words]):
        del tensors[f"{predictions}decoder.weight"]
    return tied


def momentum(names: Names, tensors: Tensors, source: object) -> Tensors:
    """The momentum encoders by our names and the queues, [size, projection], of a pretraining's file (BLIP,
    ALBEF); `names` are those of the model itself. Matching head and temperature have no copy. ModelError for what is
    missing.
    """
    theirs = {
        ours: re.sub(r"^(visual_encoder|text_encoder|vision_proj|text_proj)\.", r"\1_m.", several[0])
        for ours, several in names.items()
    }
    theirs = {ours: name for ours, name in theirs.items() if re.match(r"\w+_m\.", name)}
    wanted = once([*theirs.items(), ("queue_image", "image_queue"), ("queue_text", "text_queue")])
    missing = sorted({name for several in wanted.values() for name in several} - tensors.keys())
    refuse(source, [("missing", missing)])
    kept = {ours: tensors[several[0]] for ours, several in wanted.items()}
    return {name: t.T.contiguous() if name.startswith("queue_") else t for name, t in kept.items()}


def depth(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many layers a file has under a prefix: one more than the last one's number."""
    numbers = {int(name.removeprefix(prefix).partition(".")[0]) for name in tensors if name.startswith(prefix)}
    return max(numbers, default=-1) + 1


def take(tensors: Tensors, wanted: Names, source: object, ignored: Mapping[str, str]) -> Tensors:
    """A file's tensors by our names. Every key of the file is used, or is in `ignored` (pattern -> why).

    Raises:
        ModelError: keys that are missing or unexpected, or one tensor of ours that has two values there.
    """
    theirs = {name for several in wanted.values() for name in several}
    missing = sorted(theirs - tensors.keys())
    unexpected = sorted(name for name in tensors.keys() - theirs if not why_ignored(name, ignored))
    differ = [] if missing else sorted(ours for ours, several in wanted.items() if not equal(tensors, several))
    refuse(source, [("missing", missing), ("unexpected", unexpected), ("of two values", differ)])
    return {ours: tensors[several[0]] for ours, several in wanted.items()}


@contextmanager
def fitting(source: object) -> Iterator[None]:
    """Tell in one line of tensors that are of no possible architecture: ModelError."""
    try:
        yield
    except KeyError as error:
        raise ModelError(f"{source} does not fit any architecture: {error.args[0]} is missing") from None
    except (ValueError, IndexError) as error:  # tensors of impossible shapes; pydantic's errors are ValueErrors
        raise ModelError(f"{source} does not fit any architecture: {' '.join(str(error).split())[:200]}") from None


def refuse(source: object, faults: Iterable[tuple[str, list[str]]]) -> None:
    """Raise ModelError with the first names of every fault, if there is one."""
    misfits = "; ".join(
        f"{len(keys)} {kind}: {', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''}" for kind, keys in faults if keys
    )
    if misfits:
        raise ModelError(f"{source} does not fit the architecture: {misfits}")


def why_ignored(name: str, ignored: Mapping[str, str]) -> str:
    """Why a key is left behind on purpose, or ""."""
    return next((why for pattern, why in ignored.items() if re.fullmatch(pattern, name)), "")


def equal(tensors: Tensors, several: Iterable[str]) -> bool:
    """Whether all of these tensors are there with the same values, or none of them is."""
    first, *others = (tensors.get(name) for name in several)
    import torch

    return all(a is first or (a is not None and first is not None and torch.equal(first, a)) for a in others)


def join_projections(tensors: Tensors, place: str, parts: Iterable[str], joined: str) -> None:
    """Join the weights and the biases of queries, keys and values, in place: their names have `place` with each of
    `parts` in it, and the joined ones `joined`. ModelError where one is missing beside the first."""
    import torch

    first, *_ = names = [place.format(part) for part in parts]
    for name in [name for name in tensors if first in name]:
        several = [name.replace(first, other) for other in names]
        if missing := [one for one in several if one not in tensors]:
            raise ModelError(f"{missing[0]} is missing beside {name}")
        tensors[name.replace(first, joined)] = torch.cat([tensors.pop(one) for one in several])
