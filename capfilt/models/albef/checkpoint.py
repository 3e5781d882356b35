"""ALBEF's `.pth`, and the ViT and BERT that its pretraining begins with.

A pretraining's text keys stand behind `text_encoder.bert.`, a fine-tuned model's, which has no head that guesses hidden
words, behind `text_encoder.`. BERT's first six layers become the text layers, its last six the fusion layers.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from capfilt.models.albef.config import AlbefConfig
from capfilt.models.albef.model import Albef
from capfilt.models.checkpoints import key_maps, towers
from capfilt.models.checkpoints.files import Tensors
from capfilt.models.checkpoints.fill import continue_parts
from capfilt.models.checkpoints.key_maps import LM_HEAD, TIMM_VISION, TYPES, WORDS, expand, once
from capfilt.models.family import FamilyCode
from capfilt.models.interface import Names, OriginalFormat
from capfilt.models.layers.bert import TEXT_BLOCK
from capfilt.models.layers.vit import VISION_BLOCK

VISION, TEXT, PRETRAINED, PREDICTIONS = (
    "visual_encoder.", "text_encoder.", "text_encoder.bert.", "text_encoder.cls.predictions.",
)  # fmt: skip


class AlbefPth(OriginalFormat):
    """A `.pth` of ALBEF's own code (salesforce/ALBEF), of a pretraining or a fine-tuning for retrieval."""

    name = "ALBEF"

    def lacks(self, tensors: Tensors) -> str:
        if f"{VISION}pos_embed" in tensors and any(stack + TYPES in tensors for stack in (TEXT, PRETRAINED)):
            return ""
        return f"{VISION}pos_embed, or both of {TEXT}{TYPES} and {PRETRAINED}{TYPES}"

    def architecture(self, tensors: Tensors, described: AlbefConfig | None, source: Path) -> AlbefConfig:
        stack = PRETRAINED if PRETRAINED + WORDS in tensors else TEXT
        pretrained = stack == PRETRAINED
        tied = key_maps.unify_head(tensors, PREDICTIONS, stack + WORDS)
        roles = ("encoder", "decoder") if pretrained else ("encoder",)
        if described is not None:
            return described.changed(roles=roles, tie_lm_head=tied)
        with key_maps.fitting(source):
            vision, text = towers.vit_of_shapes(tensors, VISION), towers.fusion_of_shapes(tensors, stack)
            read = AlbefConfig(vision=vision, text=text, projection=tensors["vision_proj.weight"].shape[0])
            return read.changed(roles=roles, tie_lm_head=tied)

    def names(self, config: AlbefConfig) -> Names:
        pretrained = "decoder" in config.text.roles
        stack = PRETRAINED if pretrained else TEXT
        lines = [*expand(TIMM_VISION, config.vision.depth, "vision.", VISION)]
        lines += expand({**key_maps.COMPARING, "match_head.*": "itm_head.*", "temperature": "temp"}, 1, "", "")
        if pretrained:
            lines += expand(LM_HEAD, 1, "text.head.", PREDICTIONS)
        if pretrained and not config.text.tie_lm_head:
            lines.append(("text.head.weight", f"{PREDICTIONS}decoder.weight"))
        return once(lines) | key_maps.text_names(config.text, {"encoder": stack, "decoder": stack})

    def momentum(self, config: AlbefConfig, tensors: Tensors, source: object) -> Tensors:
        for stack in ("text_encoder_m.", "text_encoder."):
            key_maps.unify_head(tensors, f"{stack}cls.predictions.", f"{stack}bert.{WORDS}")
        return key_maps.momentum(self.names(config), tensors, source)

    def write(self, config: AlbefConfig, tensors: Tensors) -> Tensors:
        """Our tensors by the file's names; its own code expects the head's tied names as well."""
        written = {theirs: tensors[ours] for ours, several in self.names(config).items() for theirs in several}
        if "decoder" in config.text.roles:
            written[f"{PREDICTIONS}decoder.bias"] = written[f"{PREDICTIONS}bias"]
            written.setdefault(f"{PREDICTIONS}decoder.weight", written[PRETRAINED + WORDS])
        return written


CODE = FamilyCode(
    build=Albef,
    blocks=(VISION_BLOCK, TEXT_BLOCK),
    continued=partial(continue_parts, Albef),
    initial={"vision": towers.vision_from, "text": towers.text_from},
    original=AlbefPth(),
    ignored=key_maps.NOT_MODEL,
)
