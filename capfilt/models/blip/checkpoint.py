"""BLIP's checkpoints: transformers' classes, BLIP's own `.pth`, and the ViT and BERT that a pretraining begins with.

BERT's token types are dropped, as BLIP drops them, though BERT adds the first of them to every word. Cross-attention is
in no BERT: it starts fresh, and so do [DEC], [ENC] and the heads that compare.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from capfilt.models.architecture import ArchitectureConfig
from capfilt.models.blip import transformers_config
from capfilt.models.blip.config import BlipConfig
from capfilt.models.blip.model import Blip
from capfilt.models.checkpoints import key_maps, towers
from capfilt.models.checkpoints.files import Tensors
from capfilt.models.checkpoints.fill import load_whole
from capfilt.models.checkpoints.key_maps import (
    BERT,
    HF_VISION,
    LM_HEAD,
    TIMM_VISION,
    TYPES,
    WORDS,
    Table,
    equal,
    expand,
    once,
)
from capfilt.models.checkpoints.transformers_folder import possible
from capfilt.models.family import FamilyCode
from capfilt.models.interface import Names, OriginalFormat, TransformersFormat
from capfilt.models.layers.bert import TEXT_BLOCK
from capfilt.models.layers.config import APART, Role, Share, TextConfig
from capfilt.models.layers.vit import VISION_BLOCK

Layout = Literal["hf", "pth"]

VISION: dict[Layout, tuple[str, Table]] = {
    "hf": ("vision_model.", HF_VISION),
    "pth": ("visual_encoder.", TIMM_VISION),
}
COMPARING: Table = {**key_maps.COMPARING, "match_head.*": "itm_head.*"}

STACKS: dict[str, str] = {"encoder": "text_encoder.", "decoder": "text_decoder.bert."}
PREDICTIONS = "text_decoder.cls.predictions."
OUTPUT = f"{PREDICTIONS}decoder.weight"


def names(config: BlipConfig, layout: Layout) -> Names:
    """What a file of that layout calls the tensors of a model of ours. The temperature of ITC has no place in "hf"."""
    prefix, table = VISION[layout]
    lines = [*expand(table, config.vision.depth, "vision.", prefix)]
    if "decoder" in config.text.roles:
        lines += expand(LM_HEAD, 1, "text.head.", PREDICTIONS)
        if not config.text.tie_lm_head:
            lines.append(("text.head.weight", OUTPUT))
    if config.compares:
        lines += expand(COMPARING, 1, "", "")
        if layout == "pth":
            lines.append(("temperature", "temp"))
    return once(lines) | key_maps.text_names(config.text, STACKS)


def unify_head(tensors: Tensors) -> bool:
    """`key_maps.unify_head` of the decoder."""
    return key_maps.unify_head(tensors, PREDICTIONS, STACKS["decoder"] + WORDS)


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


def from_shapes(tensors: Tensors) -> BlipConfig:
    """The architecture of a `.pth` of BLIP's, which says nothing about it; its LM head is settled."""
    roles: tuple[Role, ...] = tuple(role for role in get_args(Role) if STACKS[role] + WORDS in tensors)
    stack = STACKS[roles[-1]]
    projection = tensors["vision_proj.weight"].shape[0] if "vision_proj.weight" in tensors else 256
    return BlipConfig(
        vision=towers.vit_of_shapes(tensors, "visual_encoder."),
        text=TextConfig(
            **towers.bert_of_shapes(tensors, stack),
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
    return next(share for share, parts in sorted(APART.items(), key=lambda item: len(item[1])) if apart <= parts)


def _differ(tensors: Tensors, table: Table) -> bool:
    depth = key_maps.depth(tensors, f"{STACKS['decoder']}encoder.layer.")
    stems = [theirs for _, theirs in expand(table, depth, "", "")]
    return not all(equal(tensors, [stack + stem for stack in STACKS.values()]) for stem in stems)


class BlipPth(OriginalFormat):
    """A `.pth` of BLIP's own code (salesforce/BLIP)."""

    name = "BLIP"

    def lacks(self, tensors: Tensors) -> str:
        words = [stack + WORDS for stack in STACKS.values()]
        if any(name.endswith(TYPES) for name in tensors):
            return "a text encoder without token types"
        if "visual_encoder.pos_embed" in tensors and any(name in tensors for name in words):
            return ""
        return f"visual_encoder.pos_embed, or both of {' and '.join(words)}"

    def architecture(self, tensors: Tensors, described: BlipConfig | None, source: Path) -> BlipConfig:
        """The architecture by the tensors' shapes, or as a YAML describes it; whether the LM head is tied the tensors
        decide."""
        tied = unify_head(tensors)
        if described is not None:
            return described.changed(tie_lm_head=tied)
        with key_maps.fitting(source):
            return from_shapes(tensors)

    def names(self, config: BlipConfig) -> Names:
        return names(config, "pth")

    def momentum(self, config: BlipConfig, tensors: Tensors, source: object) -> Tensors:
        """The momentum encoders by our names and the queues, [size, projection]; heads and temperature have no copy."""
        return key_maps.momentum(names(config, "pth"), tensors, source)

    def write(self, config: BlipConfig, tensors: Tensors) -> Tensors:
        return give(tensors, config, "pth")


class BlipTransformers(TransformersFormat):
    """transformers' BLIP classes. None of them is a pretrained model, which both captions and matches: that becomes two
    folders. The class of filters reads a text behind [CLS], where the filter was trained with [ENC]."""

    classes = tuple(transformers_config.ROLES)
    telling = frozenset({OUTPUT, STACKS["decoder"] + WORDS})
    processor = {"processor_class": "BlipProcessor"}
    special_tokens = {"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]}

    def architecture(self, described: Mapping[str, Any], tensors: Tensors, folder: Path) -> BlipConfig:
        """What a `config.json` describes; whether the LM head is tied the tensors decide."""
        here = OUTPUT in tensors
        tied = unify_head(tensors) and (here or transformers_config.declares_tied(described))
        with possible(folder):
            return transformers_config.architecture(described, tied, folder)

    def names(self, config: BlipConfig) -> Names:
        return names(config, "hf")

    def absent(self, config: BlipConfig) -> Tensors:
        """The temperature of ITC, for which the file has no place."""
        return {"temperature": torch.tensor(config.temperature)} if config.compares else {}

    def write(self, config: BlipConfig, tensors: Tensors, special: Mapping[str, int]) -> tuple[dict[str, Any], Tensors]:
        """The `config.json` of a captioner, a filter or a model that answers, and its tensors."""
        temperature = float(tensors.pop("temperature", torch.tensor(config.temperature)))
        described = transformers_config.describe(config, temperature, special)
        # safetensors refuses one storage under two names.
        return described, {name: tensor.clone() for name, tensor in give(tensors, config, "hf").items()}

    def parts(self, config: BlipConfig) -> dict[str, dict[str, object]]:
        """One folder, or two of a pretrained model."""
        if len(config.text.roles) == 1 or config.answers:
            return {"": {}}
        return {"captioner": {"roles": ("decoder",)}, "filter": {"roles": ("encoder",)}}

    def usage(self, config: BlipConfig) -> str:
        return USAGE[transformers_config.class_of(config)].replace("ENC  #", f"{config.text.enc}  #")


def continued(config: BlipConfig, saved: ArchitectureConfig, tensors: Tensors, source: object) -> Blip:
    """The saved model with the parts and at the picture size that the new architecture has; or one that answers, whose
    encoder and decoder begin with what they share in a pretrained one."""
    parts = {"roles": config.text.roles, "image_size": config.image_size}
    if config.answers:
        parts |= {"answers": True, "answer_list": config.answer_list, "share": config.text.share}
        if config.text.share == "none":
            apart = {name: tensor for name, tensor in tensors.items() if ".shared." in name}
            for name, tensor in apart.items():
                del tensors[name]
                tensors |= {name.replace(".shared.", f".{role}."): tensor.clone() for role in config.text.roles}
    return load_whole(Blip, saved.changed(**parts), tensors, source)


def text_from(model: Blip, source: str) -> set[str]:
    """Fill the text stacks from BERT, both if they are apart, and the LM head if BERT has one itself."""
    return towers.copy(model, bert_of(model.config.text, towers.find(source), source), source)


def bert_of(config: TextConfig, tensors: Tensors, source: str) -> Tensors:
    """What BERT gives to the text stacks, by our names."""
    taken = towers.bert_stack(config, tensors, source, outputs_are_words=True)
    towers.check_vocabulary(towers.bert(tensors)[WORDS].shape[0], config.dec, ("[DEC]", "[ENC]"), source)
    return taken


USAGE = {
    "BlipForConditionalGeneration": """
    from transformers import AutoProcessor, BlipForConditionalGeneration

    processor = AutoProcessor.from_pretrained(FOLDER)
    model = BlipForConditionalGeneration.from_pretrained(FOLDER)
    ids = model.generate(**processor(images=image, return_tensors="pt"), num_beams=3, min_length=5, max_length=20)
    print(processor.decode(ids[0], skip_special_tokens=True))
""",
    "BlipForImageTextRetrieval": """
    from transformers import AutoProcessor, BlipForImageTextRetrieval

    processor = AutoProcessor.from_pretrained(FOLDER)
    model = BlipForImageTextRetrieval.from_pretrained(FOLDER)
    inputs = processor(images=image, text=text, return_tensors="pt")
    cosine = model(**inputs, use_itm_head=False).itm_score
    inputs["input_ids"][:, 0] = ENC  # [ENC], as in training: behind [CLS] the scores are others
    p_match = model(**inputs).itm_score.softmax(dim=1)[:, 1]
""",
    "BlipForQuestionAnswering": """
    from transformers import AutoProcessor, BlipForQuestionAnswering

    processor = AutoProcessor.from_pretrained(FOLDER)
    model = BlipForQuestionAnswering.from_pretrained(FOLDER)
    inputs = processor(images=image, text=question, return_tensors="pt")
    inputs["input_ids"][:, 0] = ENC  # [ENC], as in training
    print(processor.decode(model.generate(**inputs, max_new_tokens=10)[0], skip_special_tokens=True))
""",
}
"""By the class of transformers."""


CODE = FamilyCode(
    build=Blip,
    blocks=(VISION_BLOCK, TEXT_BLOCK),
    continued=continued,
    initial={"vision": towers.vision_from, "text": text_from},
    transformers=BlipTransformers(),
    original=BlipPth(),
    ignored=key_maps.NOT_MODEL,
)
