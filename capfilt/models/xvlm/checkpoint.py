"""X-VLM's `.th`, and the Swin and BERT that its pretraining begins with.

A file of a pretraining has its text stack behind `text_encoder.bert.`, one of a fine-tuning behind `text_encoder.`, one
of a captioner behind `text_decoder.bert.`. Swin's files carry constants, the index of offsets and the masks of shifted
windows, which are computed here.
"""

from __future__ import annotations

import math
from pathlib import Path

from capfilt.errors import ModelError
from capfilt.models.architecture import ArchitectureConfig
from capfilt.models.checkpoints import key_maps, towers
from capfilt.models.checkpoints.files import Tensors
from capfilt.models.checkpoints.fill import load_whole
from capfilt.models.checkpoints.key_maps import LM_HEAD, TYPES, WORDS, Table, expand, once
from capfilt.models.interface import Names, OriginalFormat
from capfilt.models.layers.config import FusionTextConfig, Role, SwinConfig
from capfilt.models.layers.swin import resize_windows
from capfilt.models.xvlm.config import XvlmConfig
from capfilt.models.xvlm.model import Xvlm

VISION, PATCHES, OFFSETS = "vision_encoder.", "patch_embed.proj.weight", "attn.relative_position_bias_table"
STACKS: dict[tuple[Role, ...], str] = {
    ("encoder", "decoder"): "text_encoder.bert.",
    ("encoder",): "text_encoder.",
    ("decoder",): "text_decoder.bert.",
}
"""What the text stack of a pretrained model, a filter and a captioner is called."""
CONSTANTS = {
    r".*\battn_mask|.*relative_position_index": "constants of Swin, which the picture size decides",
}
NOT_MODEL = {**CONSTANTS, r".*embeddings\.position_ids": "a constant, 0, 1, 2, ..."}
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


def names(config: XvlmConfig) -> Names:
    """What a file calls the tensors of a model of ours."""
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
    return swin_names(config.vision, "vision.", VISION) | once(lines) | text


def predictions_of(stack: str) -> str:
    """Where the head over the vocabulary is, beside a text stack."""
    return f"{stack.removesuffix('bert.')}cls.predictions."


class XvlmTh(OriginalFormat):
    """A `.th` of X-VLM's own code (zengyan-97/X-VLM): of a pretraining, a fine-tuning for retrieval, or a captioner."""

    name = "X-VLM"

    def lacks(self, tensors: Tensors) -> str:
        """What a file lacks to be one of these checkpoints; "" for nothing."""
        if f"{VISION}layers.0.blocks.0.{OFFSETS}" not in tensors:
            return f"{VISION}layers.0.blocks.0.{OFFSETS}, of X-VLM with Swin"
        if not any(stack + TYPES in tensors for stack in STACKS.values()):
            return " and ".join(stack + TYPES for stack in STACKS.values())
        return ""

    def architecture(self, tensors: Tensors, described: XvlmConfig | None, source: Path) -> XvlmConfig:
        """The architecture by the tensors' shapes, or as a YAML describes it."""
        roles, stack = next((item for item in STACKS.items() if item[1] + WORDS in tensors), (("encoder",), ""))
        tied = key_maps.unify_head(tensors, predictions_of(stack), stack + WORDS)
        if described is not None:
            return described.changed(roles=roles, tie_lm_head=tied)
        with key_maps.fitting(source):
            return _from_shapes(tensors, stack).changed(roles=roles, tie_lm_head=tied)

    def names(self, config: XvlmConfig) -> Names:
        """What the file calls the tensors of a model of ours."""
        return names(config)

    def momentum(self, config: XvlmConfig, tensors: Tensors, source: object) -> Tensors:
        """X-VLM trains without a momentum copy; ModelError."""
        raise ModelError(f"{source} has no momentum copy: X-VLM is trained without one")

    def write(self, config: XvlmConfig, tensors: Tensors) -> Tensors:
        """Our tensors by the file's names; its own code expects the head's tied names as well."""
        written = {theirs: tensors[ours] for ours, several in names(config).items() for theirs in several}
        if "decoder" in config.text.roles:
            stack = STACKS[config.text.roles]
            predictions = predictions_of(stack)
            written[f"{predictions}decoder.bias"] = written[f"{predictions}bias"]
            written.setdefault(f"{predictions}decoder.weight", written[stack + WORDS])
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


def _from_shapes(tensors: Tensors, stack: str) -> XvlmConfig:
    """The architecture of a file that says nothing of it. Heads of the text stack leave no trace in the shapes: they
    are 64 wide in every released checkpoint."""
    vocab_size, width = tensors[stack + WORDS].shape
    if width % 64:
        raise ValueError(
            f"its text stack is {width} wide, not a multiple of 64, and the file does not say how many heads it has; "
            "write the architecture into a YAML of the same name beside it"
        )
    depth = key_maps.depth(tensors, f"{stack}encoder.layer.")
    fused = [n for n in range(depth) if f"{stack}encoder.layer.{n}.crossattention.self.query.weight" in tensors]
    if not fused:
        raise KeyError(f"{stack}encoder.layer.*.crossattention")
    return XvlmConfig(
        vision=swin_from_shapes(tensors, VISION),
        text=FusionTextConfig(
            vocab_size=vocab_size,
            width=width,
            depth=depth,
            heads=width // 64,
            hidden=tensors[f"{stack}encoder.layer.0.intermediate.dense.weight"].shape[0],
            max_positions=tensors[f"{stack}embeddings.position_embeddings.weight"].shape[0],
            fusion_layer=fused[0],
        ),
        projection=tensors["vision_proj.weight"].shape[0] if "vision_proj.weight" in tensors else 256,
    )


def continued(config: XvlmConfig, saved: ArchitectureConfig, tensors: Tensors, source: object) -> Xvlm:
    """The saved model with the parts and at the picture size that the new architecture has."""
    return load_whole(Xvlm, saved.changed(roles=config.text.roles, image_size=config.image_size), tensors, source)


def vision_from(model: Xvlm, source: str) -> set[str]:
    """Fill the vision tower from a Swin of its own code, whatever the size of its windows; returns the names of its
    tensors."""
    tensors = {
        name: tensor
        for name, tensor in towers.find(source).items()
        if not key_maps.why_ignored(name, CONSTANTS) and not name.startswith("head.")
    }
    config = model.config.vision
    taken = key_maps.take(tensors, swin_names(config, "vision.", ""), source, {})
    resize_windows(taken, config.window, "vision.")
    return towers.copy(model, taken, source)


def text_from(model: Xvlm, source: str) -> set[str]:
    """Fill the text stack from BERT, and the head that guesses hidden words if BERT has one itself."""
    return towers.copy(model, towers.fusion_bert(model.config.text, towers.find(source), source), source)
