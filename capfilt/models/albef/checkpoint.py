"""ALBEF's `.pth`, and the ViT and BERT that its pretraining begins with.

A pretraining's text keys stand behind `text_encoder.bert.`, a fine-tuned model's, which has no head that guesses hidden
words, behind `text_encoder.`. BERT's first six layers become the text layers, its last six the fusion layers.
"""

from __future__ import annotations

import math
from pathlib import Path

from capfilt.models.albef.config import AlbefConfig
from capfilt.models.albef.model import Albef
from capfilt.models.architecture import ArchitectureConfig
from capfilt.models.checkpoints import key_maps, towers
from capfilt.models.checkpoints.files import Tensors
from capfilt.models.checkpoints.fill import load_whole
from capfilt.models.checkpoints.key_maps import LM_HEAD, TIMM_VISION, TYPES, WORDS, expand, once
from capfilt.models.interface import Names, OriginalFormat
from capfilt.models.layers.config import FusionTextConfig, VisionConfig

VISION, TEXT, PRETRAINED, PREDICTIONS = (
    "visual_encoder.", "text_encoder.", "text_encoder.bert.", "text_encoder.cls.predictions.",
)  # fmt: skip


def names(config: AlbefConfig) -> Names:
    """What a file calls the tensors of a model of ours."""
    pretrained = "decoder" in config.text.roles
    stack = PRETRAINED if pretrained else TEXT
    lines = [*expand(TIMM_VISION, config.vision.depth, "vision.", VISION)]
    lines += expand({**key_maps.COMPARING, "match_head.*": "itm_head.*", "temperature": "temp"}, 1, "", "")
    if pretrained:
        lines += expand(LM_HEAD, 1, "text.head.", PREDICTIONS)
    if pretrained and not config.text.tie_lm_head:
        lines.append(("text.head.weight", f"{PREDICTIONS}decoder.weight"))
    return once(lines) | key_maps.text_names(config.text, {"encoder": stack, "decoder": stack})


class AlbefPth(OriginalFormat):
    """A `.pth` of ALBEF's own code (salesforce/ALBEF), of a pretraining or a fine-tuning for retrieval."""

    name = "ALBEF"

    def lacks(self, tensors: Tensors) -> str:
        """What a file lacks to be one of these checkpoints; "" for nothing."""
        if f"{VISION}pos_embed" in tensors and any(stack + TYPES in tensors for stack in (TEXT, PRETRAINED)):
            return ""
        return f"{VISION}pos_embed, or both of {TEXT}{TYPES} and {PRETRAINED}{TYPES}"

    def architecture(self, tensors: Tensors, described: AlbefConfig | None, source: Path) -> AlbefConfig:
        """The architecture by the tensors' shapes, or as a YAML describes it."""
        stack = PRETRAINED if PRETRAINED + WORDS in tensors else TEXT
        pretrained = stack == PRETRAINED
        tied = key_maps.unify_head(tensors, PREDICTIONS, stack + WORDS)
        roles = ("encoder", "decoder") if pretrained else ("encoder",)
        if described is not None:
            return described.changed(roles=roles, tie_lm_head=tied)
        with key_maps.fitting(source):
            return _from_shapes(tensors, stack).changed(roles=roles, tie_lm_head=tied)

    def names(self, config: AlbefConfig) -> Names:
        """What the file calls the tensors of a model of ours."""
        return names(config)

    def momentum(self, config: AlbefConfig, tensors: Tensors, source: object) -> Tensors:
        """The momentum encoders by our names and the queues, [size, projection]."""
        for stack in ("text_encoder_m.", "text_encoder."):
            key_maps.unify_head(tensors, f"{stack}cls.predictions.", f"{stack}bert.{WORDS}")
        return key_maps.momentum(names(config), tensors, source)

    def write(self, config: AlbefConfig, tensors: Tensors) -> Tensors:
        """Our tensors by the file's names; its own code expects the head's tied names as well."""
        written = {theirs: tensors[ours] for ours, several in names(config).items() for theirs in several}
        if "decoder" in config.text.roles:
            written[f"{PREDICTIONS}decoder.bias"] = written[f"{PREDICTIONS}bias"]
            written.setdefault(f"{PREDICTIONS}decoder.weight", written[PRETRAINED + WORDS])
        return written


def _from_shapes(tensors: Tensors, stack: str) -> AlbefConfig:
    """The architecture of a file that says nothing of it. Heads leave no trace in the shapes: they are 64 wide in every
    released checkpoint."""
    patch = tensors[f"{VISION}patch_embed.proj.weight"].shape[-1]
    tokens, vision_width = tensors[f"{VISION}pos_embed"].shape[1:]
    vocab_size, width = tensors[stack + WORDS].shape
    for tower, size in (("vision", vision_width), ("text", width)):
        if size % 64:
            raise ValueError(
                f"its {tower} tower is {size} wide, not a multiple of 64, and the file does not say how many heads it "
                "has; write the architecture into a YAML of the same name beside it"
            )
    depth = key_maps.depth(tensors, f"{stack}encoder.layer.")
    fused = [n for n in range(depth) if f"{stack}encoder.layer.{n}.crossattention.self.query.weight" in tensors]
    if not fused:
        raise KeyError(f"{stack}encoder.layer.*.crossattention")
    return AlbefConfig(
        vision=VisionConfig(
            image_size=math.isqrt(tokens - 1) * patch,
            patch_size=patch,
            width=vision_width,
            depth=key_maps.depth(tensors, f"{VISION}blocks."),
            heads=vision_width // 64,
            hidden=tensors[f"{VISION}blocks.0.mlp.fc1.weight"].shape[0],
        ),
        text=FusionTextConfig(
            vocab_size=vocab_size,
            width=width,
            depth=depth,
            heads=width // 64,
            hidden=tensors[f"{stack}encoder.layer.0.intermediate.dense.weight"].shape[0],
            max_positions=tensors[f"{stack}embeddings.position_embeddings.weight"].shape[0],
            fusion_layer=fused[0],
        ),
        projection=tensors["vision_proj.weight"].shape[0],
    )


def continued(config: AlbefConfig, saved: ArchitectureConfig, tensors: Tensors, source: object) -> Albef:
    """The saved model with the parts and at the picture size that the new architecture has."""
    return load_whole(Albef, saved.changed(roles=config.text.roles, image_size=config.image_size), tensors, source)


def vision_from(model: Albef, source: str) -> set[str]:
    """Fill the vision tower from a ViT; returns the names of its tensors."""
    return towers.copy(model, towers.vit(model.config.vision, towers.find(source), source), source)


def text_from(model: Albef, source: str) -> set[str]:
    """Fill the text stack from BERT, and the head that guesses hidden words if BERT has one itself."""
    return towers.copy(model, towers.fusion_bert(model.config.text, towers.find(source), source), source)
