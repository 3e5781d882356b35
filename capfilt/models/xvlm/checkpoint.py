"""X-VLM's `.th`, and the vision tower (a Swin, CLIP's ViT or DeiT) and BERT that its pretraining begins with.

A file of a pretraining has its text stack behind `text_encoder.bert.`, one of a fine-tuning behind `text_encoder.`, one
of a captioner behind `text_decoder.bert.`. Constants in a file are computed here: a Swin's index of offsets and masks
of shifted windows, a CLIP's numbers of positions.
"""

from __future__ import annotations

import logging
import math
from functools import partial
from pathlib import Path

import torch

from capfilt.errors import ModelError
from capfilt.models.checkpoints import key_maps, towers
from capfilt.models.checkpoints.files import Tensors
from capfilt.models.checkpoints.fill import continue_parts
from capfilt.models.checkpoints.key_maps import LM_HEAD, TYPES, WORDS, Table, expand, once
from capfilt.models.family import FamilyCode
from capfilt.models.interface import Names, OriginalFormat
from capfilt.models.layers.bert import TEXT_BLOCK
from capfilt.models.layers.config import Role, SwinConfig
from capfilt.models.layers.swin import SWIN_BLOCK, resize_windows
from capfilt.models.layers.vit import VISION_BLOCK, resize_positions
from capfilt.models.xvlm.config import RegionVitConfig, XvlmConfig
from capfilt.models.xvlm.model import Xvlm
from capfilt.storage.local_copies import local_copy

VISION, PATCHES, OFFSETS = "vision_encoder.", "patch_embed.proj.weight", "attn.relative_position_bias_table"
FIRST = {"Swin": f"layers.0.blocks.0.{OFFSETS}", "CLIP's ViT": "class_embedding", "DeiT": "cls_token"}
"""A tensor that each kind of vision tower has, and no other."""
STACKS: dict[tuple[Role, ...], str] = {
    ("encoder", "decoder"): "text_encoder.bert.",
    ("encoder",): "text_encoder.",
    ("decoder",): "text_decoder.bert.",
}
"""What the text stack of a pretrained model, a filter and a captioner is called."""
CONSTANTS = {
    r".*\battn_mask|.*relative_position_index": "constants of Swin, which the picture size decides",
}
NOT_MODEL = {**CONSTANTS, r".*(embeddings|vision_encoder)\.position_ids": "a constant, 0, 1, 2, ..."}
"""Keys of files that are left behind on purpose, and why."""
HEADS = ("match_head", "itm_head"), ("box_head", "bbox_head")
BLOCK: Table = {
    "attention_norm.*": "norm1.*",
    "attention.qkv.*": "attn.qkv.*",
    "attention.out.*": "attn.proj.*",
    "attention.offsets": OFFSETS,
    "feed_forward_norm.*": "norm2.*",
    "feed_forward.up.*": "mlp.fc1.*",
    "feed_forward.down.*": "mlp.fc2.*",
}
CLIP_VIT: Table = {
    "cls": "class_embedding",
    "positions": "pos_embed.weight",
    "patches.weight": "patch_embed.weight",
    "pre_norm.*": "pre_layrnorm.*",
    "blocks.{n}.attention_norm.*": "encoder.layers.{n}.layer_norm1.*",
    "blocks.{n}.attention.qkv.*": "encoder.layers.{n}.self_attn.qkv.*",
    "blocks.{n}.attention.out.*": "encoder.layers.{n}.self_attn.out_proj.*",
    "blocks.{n}.feed_forward_norm.*": "encoder.layers.{n}.layer_norm2.*",
    "blocks.{n}.feed_forward.up.*": "encoder.layers.{n}.mlp.fc1.*",
    "blocks.{n}.feed_forward.down.*": "encoder.layers.{n}.mlp.fc2.*",
    "norm.*": "post_layernorm.*",
}
"""Its three projections are joined before (`join_clip`) and split again behind (`split_clip`)."""


def vision_names(config: SwinConfig | RegionVitConfig) -> Names:
    """What the file calls the tensors of the vision tower."""
    if isinstance(config, SwinConfig):
        return swin_names(config, "vision.", VISION)
    return once(expand(CLIP_VIT if config.pre_norm else key_maps.TIMM_VISION, config.depth, "vision.", VISION))


def join_clip(tensors: Tensors) -> None:
    """Bring CLIP's tower in a file to our shapes, under the file's names, in place; nothing where it has none."""
    key_maps.join_projections(tensors, ".self_attn.{}_proj.", "qkv", ".self_attn.qkv.")
    for name in (f"{VISION}class_embedding", f"{VISION}pos_embed.weight"):
        if name in tensors:
            tensors[name] = tensors[name].reshape(1, -1, tensors[name].shape[-1])


def split_clip(tensors: Tensors) -> None:
    """The other way, with the constant that X-VLM's own code takes out of its files before it reads them; in place."""
    for name in [name for name in tensors if ".self_attn.qkv." in name]:
        for part, third in zip("qkv", tensors.pop(name).chunk(3), strict=True):
            tensors[name.replace(".qkv.", f".{part}_proj.")] = third.contiguous()
    tensors[f"{VISION}class_embedding"] = tensors[f"{VISION}class_embedding"].flatten()
    positions = tensors[f"{VISION}pos_embed.weight"] = tensors[f"{VISION}pos_embed.weight"][0]
    tensors[f"{VISION}position_ids"] = torch.arange(len(positions))[None]


def swin_names(config: SwinConfig, ours: str, theirs: str) -> Names:
    """What Swin's own code calls the tensors of a tower."""
    lines = [*expand({"patches.*": "patch_embed.proj.*", "patch_norm.*": "patch_embed.norm.*", "norm.*": "norm.*"}, 1,
                     ours, theirs)]  # fmt: skip
    for stage, depth in enumerate(config.depths):
        table = {f"blocks.{{n}}.{mine}": f"blocks.{{n}}.{name}" for mine, name in BLOCK.items()}
        lines += expand(table, depth, f"{ours}stages.{stage}.", f"{theirs}layers.{stage}.")
        if stage < len(config.depths) - 1:
            merge: Table = {"norm.*": "norm.*", "reduce.weight": "reduction.weight"}
            lines += expand(merge, 1, f"{ours}stages.{stage}.merge.", f"{theirs}layers.{stage}.downsample.")
    return once(lines)


def predictions_of(stack: str) -> str:
    """Where the head over the vocabulary is, beside a text stack."""
    return f"{stack.removesuffix('bert.')}cls.predictions."


class XvlmTh(OriginalFormat):
    """A `.th` of X-VLM's own code (zengyan-97/X-VLM): of a pretraining, a fine-tuning for retrieval, or a captioner."""

    name = "X-VLM"

    def lacks(self, tensors: Tensors) -> str:
        if not any(VISION + name in tensors for name in FIRST.values()):
            return " and ".join(f"{VISION}{name} (of {tower})" for tower, name in FIRST.items())
        if not any(stack + TYPES in tensors for stack in STACKS.values()):
            return " and ".join(stack + TYPES for stack in STACKS.values())
        return ""

    def architecture(self, tensors: Tensors, described: XvlmConfig | None, source: Path) -> XvlmConfig:
        roles, stack = next((item for item in STACKS.items() if item[1] + WORDS in tensors), (("encoder",), ""))
        tied = key_maps.unify_head(tensors, predictions_of(stack), stack + WORDS)
        join_clip(tensors)
        if described is not None:
            return described.changed(roles=roles, tie_lm_head=tied)
        with key_maps.fitting(source):
            config = _from_shapes(tensors, stack).changed(roles=roles, tie_lm_head=tied)
        if isinstance(config.vision, RegionVitConfig) and config.vision.pre_norm:
            logging.getLogger(__name__).warning(
                "%s does not say which activation its CLIP tower is of; taken for quick_gelu, as in X-VLM's "
                "config_clipvitB.json. Another one goes into a YAML of the same name beside it.", source
            )  # fmt: skip
        return config

    def names(self, config: XvlmConfig) -> Names:
        stack, lines = STACKS[config.text.roles], list[tuple[str, str]]()
        if config.compares:
            lines += expand({**key_maps.COMPARING, "temperature": "temp"}, 1, "", "")
        for ours, theirs in HEADS[: config.compares + config.grounds]:
            lines += expand({f"{n}.*": f"{n}.*" for n in (0, 1, 3)}, 1, f"{ours}.", f"{theirs}.")
        if "decoder" in config.text.roles:
            predictions = predictions_of(stack)
            lines += expand(LM_HEAD, 1, "text.head.", predictions)
            if not config.text.tie_lm_head:
                lines.append(("text.head.weight", f"{predictions}decoder.weight"))
        text = key_maps.text_names(config.text, {"encoder": stack, "decoder": stack})
        return vision_names(config.vision) | once(lines) | text

    def write(self, config: XvlmConfig, tensors: Tensors) -> Tensors:
        """Our tensors by the file's names; its own code expects the head's tied names as well."""
        written = {theirs: tensors[ours] for ours, several in self.names(config).items() for theirs in several}
        if "decoder" in config.text.roles:
            stack = STACKS[config.text.roles]
            predictions = predictions_of(stack)
            written[f"{predictions}decoder.bias"] = written[f"{predictions}bias"]
            written.setdefault(f"{predictions}decoder.weight", written[stack + WORDS])
        if f"{VISION}class_embedding" in written:
            split_clip(written)
        return written


def swin_from_shapes(tensors: Tensors, prefix: str) -> SwinConfig:
    """The Swin that a file holds."""
    embed, _, patch, _ = tensors[prefix + PATCHES].shape
    stages = range(key_maps.depth(tensors, f"{prefix}layers."))
    rows = tensors[f"{prefix}layers.0.blocks.0.{OFFSETS}"].shape[0]
    return SwinConfig(
        image_size=(math.isqrt(rows) + 1) // 2 * patch << (len(stages) - 1),
        patch_size=patch,
        embed=embed,
        depths=tuple(key_maps.depth(tensors, f"{prefix}layers.{stage}.blocks.") for stage in stages),
        stage_heads=tuple(tensors[f"{prefix}layers.{stage}.blocks.0.{OFFSETS}"].shape[1] for stage in stages),
    )


def vit_from_shapes(tensors: Tensors) -> RegionVitConfig:
    """The ViT that a file holds, CLIP's or DeiT's; heads leave no trace in the shapes, they are 64 wide in both."""
    clip = f"{VISION}class_embedding" in tensors
    table, blocks = (CLIP_VIT, "encoder.layers.") if clip else (key_maps.TIMM_VISION, "blocks.")
    hidden, width = tensors[VISION + table["blocks.{n}.feed_forward.up.*"].format(n=0).replace("*", "weight")].shape
    patch = tensors[f"{VISION}patch_embed.weight" if clip else VISION + PATCHES].shape[-1]
    of_clip = {"layer_norm_eps": 1e-5, "patch_bias": False, "pre_norm": True, "activation": "quick_gelu"}
    return RegionVitConfig.model_validate(
        {
            "image_size": math.isqrt(tensors[VISION + table["positions"]].shape[1] - 1) * patch,
            "patch_size": patch,
            "width": width,
            "depth": key_maps.depth(tensors, VISION + blocks),
            "heads": width // 64,
            "hidden": hidden,
            **(of_clip if clip else {}),
        }
    )


def _from_shapes(tensors: Tensors, stack: str) -> XvlmConfig:
    """The architecture of a file that says nothing of it."""
    return XvlmConfig(
        vision=swin_from_shapes(tensors, VISION) if VISION + FIRST["Swin"] in tensors else vit_from_shapes(tensors),
        text=towers.fusion_of_shapes(tensors, stack),
        projection=tensors["vision_proj.weight"].shape[0] if "vision_proj.weight" in tensors else 256,
    )


def vision_from(model: Xvlm, source: str) -> set[str]:
    """Fill the vision tower from a Swin of its own code, whatever the size of its windows, from a CLIP in any format,
    or from a ViT of timm, DeiT or transformers; returns the names of its tensors."""
    config = model.config.vision
    if not isinstance(config, SwinConfig):
        taken = clip_tower(model, source) if config.pre_norm else towers.vit(config, towers.find(source), source)
        return towers.copy(model, taken, source)
    tensors = {
        name: tensor
        for name, tensor in towers.find(source).items()
        if not key_maps.why_ignored(name, CONSTANTS) and not name.startswith("head.")
    }
    taken = key_maps.take(tensors, swin_names(config, "vision.", ""), source, {})
    resize_windows(taken, config.window, "vision.")
    return towers.copy(model, taken, source)


def clip_tower(model: Xvlm, source: str) -> Tensors:
    """The vision tower of a CLIP, positions interpolated. ModelError for another model, or one that is not alike."""
    from capfilt.models.checkpoints import store

    saved, tensors = store.read(local_copy(store.find(source)))
    if saved.family != "clip":
        raise ModelError(f"{source} is of the family {saved.family}; this vision tower begins with a CLIP's")
    for name, ours in model.config.towers["vision"].items():
        if (theirs := saved.towers["vision"][name]) != ours:
            raise ModelError(f"{source} does not fit the architecture: its vision.{name} is {theirs}, here {ours}")
    taken = {name: tensor for name, tensor in tensors.items() if name.startswith("vision.")}
    size = model.config.vision.image_size, model.config.vision.patch_size
    return taken | {"vision.positions": resize_positions(taken["vision.positions"], *size)}


CODE = FamilyCode(
    build=Xvlm,
    blocks=(SWIN_BLOCK, VISION_BLOCK, TEXT_BLOCK),
    continued=partial(continue_parts, Xvlm),
    initial={"vision": vision_from, "text": towers.text_from},
    original=XvlmTh(),
    ignored=NOT_MODEL,
)
