"""VLMo's `.pt` in and out, and the BEiT or ViT that its vision experts begin as.

Files hold constants beside the weights, rows of the table of relative positions by pairs of tokens: they are left
behind, and written again, since the released code reads them where it changes lengths.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from capfilt.errors import ModelError
from capfilt.models.architecture import ArchitectureConfig
from capfilt.models.checkpoints import towers
from capfilt.models.checkpoints.files import Tensors
from capfilt.models.checkpoints.fill import fill
from capfilt.models.checkpoints.key_maps import EMBEDDINGS, MLM_HEAD, Table, expand, once, refuse
from capfilt.models.checkpoints.transformers_folder import possible
from capfilt.models.family import FamilyCode
from capfilt.models.interface import Names, OriginalFormat
from capfilt.models.layers.vit import resize_positions
from capfilt.models.vlmo.blocks import CROSS, IMAGE_EXTRA, image_index, joint_index, resize_relative, text_index
from capfilt.models.vlmo.config import BlocksConfig, Output, VlmoConfig, WordsConfig
from capfilt.models.vlmo.model import MULTIWAY_BLOCK, Vlmo

BLOCK: Table = {
    "attention_norm.*": "norm1.*",
    "attention.qkv.weight": "attn.qkv.weight",
    "attention.query_bias": "attn.q_bias",
    "attention.value_bias": "attn.v_bias",
    "attention.out.*": "attn.proj.*",
}
SCALES: Table = {"attention_scale": "gamma_1", "expert_scale": "gamma_2"}
EXPERTS = {"text": "_text", "image": "_imag", "fused": "_vl"}
STEM: Table = {"cls": "cls_token", "patches.*": "patch_embed.proj.*", "norm.*": "norm.*"}
HEADS: dict[Output, Table] = {
    "mlm": MLM_HEAD,
    "itm": {"match_head.*": "itm_score.fc.*"},
    "itc": {
        "image_projection.weight": "itc_image_proj.fc.weight",
        "text_projection.weight": "itc_text_proj.fc.weight",
        "logit_scale": "logit_scale",
    },
    "itc_fused": {
        "fused_image_projection.weight": "itc_vl_image_proj.fc.weight",
        "fused_text_projection.weight": "itc_vl_text_proj.fc.weight",
        "fused_logit_scale": "logit_vl_scale",
    },
}
RELATIVE = "relative_position_bias_table"
POSITIONS = "text_embeddings.position_embeddings.weight"
IGNORED = {
    r"(text_|text_imag_)?relative_position_index": "constants, the table's rows by pairs of tokens",
    r"text_embeddings\.position_ids": "a constant, 0, 1, 2, ...",
}
FRESH = (
    r"blocks\.\d+\.experts\.fused\..*|(mlm_head|match_head)\..*"
    r"|(fused_)?(image_projection|text_projection|logit_scale)(\..*)?"
)
"""What starts fresh where the model that a training goes on from lacks it: what a stage before had no use for."""


def block_table(config: VlmoConfig, experts: dict[str, str]) -> Table:
    """A block's tensors in the file, by ours, with one line for each block; the fused expert is in the last alone."""
    lines: dict[str, str] = {}
    parts = BLOCK if config.vision.layer_scale is None else {**BLOCK, **SCALES}
    for n in range(config.vision.depth):
        lines |= {f"blocks.{n}.{ours}": f"blocks.{n}.{theirs}" for ours, theirs in parts.items()}
        for name, suffix in experts.items():
            if name != "fused" or n >= config.vision.depth - config.vision.fused:
                expert = f"blocks.{n}.experts.{name}"
                lines[f"{expert}.norm.*"] = f"blocks.{n}.norm2{suffix}.*"
                lines[f"{expert}.feed_forward.up.*"] = f"blocks.{n}.mlp{suffix}.fc1.*"
                lines[f"{expert}.feed_forward.down.*"] = f"blocks.{n}.mlp{suffix}.fc2.*"
    return lines


class VlmoPt(OriginalFormat):
    """A `.pt` of VLMo's own code (microsoft/unilm), of any stage or of a fine-tuning for retrieval."""

    name = "VLMo"
    wrapper = "state_dict"
    suffix = ".pt"

    def lacks(self, tensors: Tensors) -> str:
        needed = ("transformer.blocks.0.mlp_imag.fc1.weight", POSITIONS)
        return " and ".join(name for name in needed if name not in tensors)

    def architecture(self, tensors: Tensors, described: VlmoConfig | None, source: Path) -> VlmoConfig:
        """The architecture by the tensors' shapes, or as a YAML describes it; the heads are those of the file."""
        outputs = tuple(name for name, table in HEADS.items() if any(_there(t, tensors) for t in table.values()))
        if described is not None:
            return described.changed(outputs=outputs)
        with possible(source, "tensors"):
            return _from_shapes(tensors, outputs)

    def names(self, config: VlmoConfig) -> Names:
        lines = [*expand({**STEM, **block_table(config, EXPERTS)}, 1, "", "transformer.")]
        lines += expand(EMBEDDINGS, 1, "text.", "text_embeddings.")
        lines += expand({"modality.weight": "token_type_embeddings.weight", "pooler.*": "pooler.dense.*"}, 1, "", "")
        lines.append(
            ("relative.table", RELATIVE) if config.vision.relative_positions else ("positions", "transformer.pos_embed")
        )
        for output in config.outputs:
            lines += expand(HEADS[output], 1, "", "")
        return once(lines)

    def write(self, config: VlmoConfig, tensors: Tensors) -> Tensors:
        written = {theirs: tensors[ours] for ours, (theirs,) in self.names(config).items()}
        written["text_embeddings.position_ids"] = torch.arange(config.text.max_positions)[None]
        if config.vision.relative_positions:
            texts, longest, side = config.text.max_positions, config.text.longest, config.vision.side
            written["relative_position_index"] = image_index(side)
            written["text_relative_position_index"] = text_index(texts, longest, side)
            written["text_imag_relative_position_index"] = joint_index(texts, longest, side)
        return written


def _there(theirs: str, tensors: Tensors) -> bool:
    return theirs.replace("*", "weight") in tensors


def _from_shapes(tensors: Tensors, outputs: tuple[Output, ...]) -> VlmoConfig:
    """Heads of attention leave no trace in shapes where positions are absolute: 64 wide, or 34 as in base-plus."""
    width, _, patch, _ = tensors["transformer.patch_embed.proj.weight"].shape
    blocks = {int(match[1]) for name in tensors if (match := re.match(r"transformer\.blocks\.(\d+)\.", name))}
    depth, longest = max(blocks) + 1, 196
    if RELATIVE in tensors:
        rows, columns = tensors[RELATIVE].shape
        heads = columns // depth
        side = (math.isqrt(rows - IMAGE_EXTRA - CROSS - 2 * longest) + 1) // 2
        if (index := tensors.get("relative_position_index")) is not None:
            side = math.isqrt(len(index) - 1)
            longest = (rows - IMAGE_EXTRA - CROSS - (2 * side - 1) ** 2) // 2
    else:
        heads = 16 if width == 544 else width // 64
        side = math.isqrt(tensors["transformer.pos_embed"].shape[1] - 1)
    return VlmoConfig(
        vision=BlocksConfig(
            image_size=side * patch,
            patch_size=patch,
            width=width,
            depth=depth,
            heads=heads,
            hidden=len(tensors["transformer.blocks.0.mlp_imag.fc1.weight"]),
            fused=sum(f"transformer.blocks.{n}.mlp_vl.fc1.weight" in tensors for n in range(depth)),
            relative_positions=RELATIVE in tensors,
            layer_scale=0.1 if "transformer.blocks.0.gamma_1" in tensors else None,
        ),
        text=WordsConfig(
            vocab_size=len(tensors["text_embeddings.word_embeddings.weight"]),
            width=width,
            max_positions=len(tensors[POSITIONS]),
            longest=longest,
        ),
        outputs=outputs,
    )


def continued(config: VlmoConfig, saved: ArchitectureConfig, tensors: Tensors, source: object) -> Vlmo:
    """A model that goes on from a saved one, of this stage or the one before: fused experts and heads that the saved
    one lacks start fresh."""
    model = Vlmo(config)
    model.adapt(tensors)
    fresh = {n: t for n, t in model.state_dict().items() if n not in tensors and re.fullmatch(FRESH, n)}
    fill(model, {**fresh, **tensors}, source)
    return model


PROJECTIONS = {"q": "query", "k": "key", "v": "value"}
HF_TO_TIMM: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^(beit|vit|data2vec_vision)\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(encoder\.layer|layers)\.(\d+)\.", r"blocks.\2."),
    (r"\.attention\.([qkv])_proj\.", lambda match: f".attn.{PROJECTIONS[match[1]]}."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"^(blocks\.\d+)\.relative_position_bias\.", r"\1.attn."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.attention\.relative_position_bias\.", ".attn."),
    (r"\.attention\.attention\.", ".attn."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.lambda_([12])$", r".gamma_\1"),
    (r"^(encoder\.relative_position_bias|rel_pos_bias)\.", "shared."),
    (r"^layernorm\.", "norm."),
)
"""From transformers' names of a BEiT or ViT, in files and in memory, to timm's."""
LEFT_BEHIND = re.compile(
    r"(head|head_dist|fc_norm|lm_head|classifier|pooler|pre_logits|decode_head|auxiliary_head)\..*"
    r"|(embeddings\.)?mask_token|(.*\.)?relative_position_index"
)
"""Heads of other tasks, and constants."""


def vision_from(model: Vlmo, source: str) -> set[str]:
    """Fill what an image passes through, attention and its experts, from a BEiT of transformers, timm or its own code,
    or into a model of absolute positions from a ViT; returns the names of its tensors.

    A BEiT that was fine-tuned with mean pooling has no final norm: it starts fresh, as in the released code.
    """
    config, tensors = model.config, _timm_names(towers.find(source), source)
    table = {**STEM, **block_table(config, {"image": ""})}
    if "norm.weight" not in tensors:
        del table["norm.*"]
    wanted = once(expand(table, 1, "", ""))
    if config.vision.relative_positions:
        tensors = _with_table(tensors, config, source)
        wanted["relative.table"] = (RELATIVE,)
    else:
        wanted["positions"] = ("pos_embed",)
    taken = towers.take(tensors, wanted, source)
    if config.vision.relative_positions:
        table_RC, rows = taken["relative.table"], cast(Tensor, model.state_dict()["relative.table"]).clone()
        resized = resize_relative(table_RC, config.vision.side, 0)
        rows[: len(resized)] = resized
        taken["relative.table"] = rows
    else:
        taken["positions"] = resize_positions(taken["positions"], config.vision.image_size, config.vision.patch_size)
    return towers.copy(model, taken, source)


def _timm_names(tensors: Tensors, source: str) -> Tensors:
    """A BEiT's or ViT's tensors by timm's names, three projections as one, the bias of keys dropped: it moves all
    scores of a query alike, and softmax does not see it."""
    named: Tensors = {}
    for name, tensor in tensors.items():
        for pattern, to in HF_TO_TIMM:
            name = re.sub(pattern, to, name)
        if not LEFT_BEHIND.fullmatch(name):
            named[name] = tensor
    for query in [name for name in named if name.endswith(".attn.query.weight")]:
        prefix = query.removesuffix("query.weight")
        parts = [f"{prefix}{part}.weight" for part in ("query", "key", "value")]
        refuse(source, [("missing", [part for part in parts if part not in named])])
        named[f"{prefix}qkv.weight"] = torch.cat([named.pop(part) for part in parts])
        named.pop(f"{prefix}key.bias", None)
        for part in ("query", "value"):
            if (bias := named.pop(f"{prefix}{part}.bias", None)) is not None:
                named[f"{prefix}{part[0]}_bias"] = bias
    for whole in [name for name in named if name.endswith(".attn.qkv.bias")]:
        biases = named.pop(whole).chunk(3)
        named[whole.replace("qkv.bias", "q_bias")], named[whole.replace("qkv.bias", "v_bias")] = biases[0], biases[2]
    return named


def _with_table(tensors: Tensors, config: VlmoConfig, source: str) -> Tensors:
    """The same with one table of all blocks in place of one each, or of one that all share."""
    each = [f"blocks.{n}.attn.{RELATIVE}" for n in range(config.vision.depth)]
    shared = tensors.pop(f"shared.{RELATIVE}", None)
    if shared is None:
        if missing := [name for name in each if name not in tensors]:
            raise ModelError(
                f"{source} has no relative positions ({missing[0]}), and the architecture has: take a BEiT that has,"
                " or a model with vision.relative_positions=false"
            )
        return {
            **{n: t for n, t in tensors.items() if n not in each},
            RELATIVE: torch.cat([tensors[n] for n in each], 1),
        }
    return {**tensors, RELATIVE: shared.repeat(1, config.vision.depth)}


CODE = FamilyCode(
    build=Vlmo,
    blocks=(MULTIWAY_BLOCK,),
    continued=continued,
    initial={"vision": vision_from},
    original=VlmoPt(),
    ignored=IGNORED,
)
