"""BLIP-2's checkpoints: transformers' BLIP-2 classes, and what its stages begin with: a ViT, a BERT, a language model.

LAVIS' own are in `lavis.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from capfilt.errors import ModelError
from capfilt.models.architecture import ArchitectureConfig
from capfilt.models.blip2 import transformers_config
from capfilt.models.blip2.config import Blip2Config, QFormerConfig
from capfilt.models.blip2.language_model import load_language
from capfilt.models.blip2.lavis import IGNORED, Lavis
from capfilt.models.blip2.model import Blip2
from capfilt.models.checkpoints import towers
from capfilt.models.checkpoints.files import Tensors
from capfilt.models.checkpoints.fill import distinct_names, fill
from capfilt.models.checkpoints.key_maps import BERT, LM_HEAD, WORDS, expand, once
from capfilt.models.checkpoints.transformers_folder import possible
from capfilt.models.family import FamilyCode
from capfilt.models.interface import Names, TransformersFormat
from capfilt.models.layers.vit import VISION_BLOCK
from capfilt.models.registry import blank

QUERIES = {"self_attention": "self_attention", "query_feed_forward": "feed_forward", "feed_forward": "feed_forward"}
"""The parts of the Q-Former that begin as parts of BERT."""


class Blip2Transformers(TransformersFormat):
    """transformers' BLIP-2 classes. Of stage 1 they have the half that compares and matches; the head that writes, and
    the temperature of ITC, have no place there."""

    classes = (transformers_config.FILTER, transformers_config.CAPTIONER)
    telling = frozenset(
        f"language_model.{name}" for name in ("lm_head.weight", "shared.weight", "model.decoder.embed_tokens.weight")
    )

    def architecture(self, described: Mapping[str, Any], tensors: Tensors, folder: Path) -> Blip2Config:
        """What a `config.json` describes; what of the language model is tied the tensors decide."""
        with possible(folder):
            config = transformers_config.architecture(described, True, folder)
        if config.language is None:
            return config
        renamed = transformers_config.renamed
        second = {renamed(name): renamed(first) for name, first in blank(config).tied().items()}
        if transformers_config.unify_language(tensors, second):
            return config
        return config.model_copy(update={"language": config.language.model_copy(update={"tied": False})})

    def names(self, config: Blip2Config) -> Names:
        names = distinct_names(blank(config)) if config.language is not None else []
        language = [name.removeprefix("language.") for name in names if name.startswith("language.")]
        return transformers_config.names(config, language)

    def absent(self, config: Blip2Config) -> Tensors:
        """The temperature of ITC, for which the file has no place."""
        return {"temperature": torch.tensor(config.temperature)} if config.compares else {}

    def write(
        self, config: Blip2Config, tensors: Tensors, special: Mapping[str, int]
    ) -> tuple[dict[str, Any], Tensors]:
        """The `config.json` of a filter or of a model of stage 2, and its tensors."""
        temperature = float(tensors.pop("temperature", torch.tensor(config.temperature)))
        described = transformers_config.describe(config, temperature)
        return described, {theirs[0]: tensors[ours] for ours, theirs in self.names(config).items()}

    def parts(self, config: Blip2Config) -> dict[str, dict[str, object]]:
        """One folder; of stage 1 the half that compares and matches."""
        return {"": {"roles": ("encoder",)} if config.language is None else {}}

    def left_out(self, config: Blip2Config) -> dict[str, int]:
        """The head that writes in stage 1."""
        return transformers_config.left_out(config)

    def usage(self, config: Blip2Config) -> str:
        return USAGE[transformers_config.class_of(config)]


def continued(config: Blip2Config, saved: ArchitectureConfig, tensors: Tensors, source: object) -> Blip2:
    """A model that goes on from a saved one: BLIP-2's second stage from its first.

    What only the new model has, the layer before the language model, starts fresh; what only the saved one has is left
    behind. A language model that the saved one lacks stays without weights, on the meta device, until it is put there,
    and so does the memory of a vision tower of which there is nothing (`store.load_filled`).
    """
    model: Any = blank(config)
    has_language = any(name.startswith("language.") for name in tensors)
    nn.Module.to_empty(model, device="cpu", recurse=False)
    for name, part in model.named_children():
        if name != "language" or has_language:
            part.to_empty(device="cpu")
    if config.language is not None:
        model.language.tie()
        model.language_projection.reset_parameters()
    model.adapt(tensors)
    elsewhere = ("language",) if any(name.startswith("vision.") for name in tensors) else ("language", "vision.")
    fresh = {n: t for n, t in model.state_dict().items() if n.startswith(elsewhere) and n not in tensors}
    fill(model, {**fresh, **tensors}, source)
    return model


def text_from(model: Blip2, source: str) -> set[str]:
    """Fill the Q-Former from BERT; returns the names of its tensors."""
    return towers.copy(model, bert_of(model.config.text, towers.find(source), source), source)


def language_from(model: Blip2, source: str) -> set[str]:
    """Give a model of the second stage its language model; returns the names of its tensors.

    Raises:
        ModelError: a model that has no place for one, or a language model that does not fit.
    """
    if model.config.language is None:
        raise ModelError(f"initial.language is {source}, and the architecture has no language model: leave it out")
    model.language = load_language(source, model.config.language, model.config.frozen)
    return {name for name in model.state_dict() if name.startswith("language.")}


def bert_of(config: QFormerConfig, tensors: Tensors, source: str) -> Tensors:
    """What BERT gives to the Q-Former: its feed-forward to texts and to queries (BLIP-2's public code)."""
    tensors = towers.bert(tensors)
    lines = [*expand({"norm.*": "embeddings.LayerNorm.*"}, 1, "text.", "")]
    if config.roles:
        lines += [
            ("text.words.weight", WORDS),
            ("text.positions.weight", "embeddings.position_embeddings.weight"),
        ]
    for part, theirs in QUERIES.items():
        if part != "feed_forward" or config.roles:
            lines += expand(BERT[theirs], config.depth, f"text.layers.{{n}}.{part}.", "")
    if "decoder" in config.roles and "cls.predictions.bias" in tensors:
        lines += expand(LM_HEAD, 1, "text.head.", "cls.predictions.")
    wanted = once(lines)
    used = {theirs for several in wanted.values() for theirs in several}
    spare = ("cls.predictions.", "embeddings.word", "embeddings.position_embeddings")
    tensors = {name: t for name, t in tensors.items() if name in used or not name.startswith(spare)}
    taken = towers.take(tensors, wanted, source)
    if config.roles:
        towers.check_vocabulary(tensors[WORDS].shape[0], config.dec, ("[DEC]",), source)
    return towers.first_positions(taken, config.max_positions)


USAGE = {
    "Blip2ForImageTextRetrieval": """
    from transformers import AutoImageProcessor, AutoTokenizer, Blip2ForImageTextRetrieval

    pixels = AutoImageProcessor.from_pretrained(FOLDER)(image, return_tensors="pt").pixel_values
    inputs = AutoTokenizer.from_pretrained(FOLDER)(text, return_tensors="pt")
    asked = (pixels, inputs["input_ids"], inputs["attention_mask"])
    model = Blip2ForImageTextRetrieval.from_pretrained(FOLDER)
    cosine = model(*asked).logits_per_image
    p_match = model(*asked, use_image_text_matching_head=True).logits_per_image.softmax(dim=1)[:, 1]
""",
    "Blip2ForConditionalGeneration": """
    from transformers import AutoImageProcessor, AutoTokenizer, Blip2ForConditionalGeneration

    pixels = AutoImageProcessor.from_pretrained(FOLDER)(image, return_tensors="pt").pixel_values
    model = Blip2ForConditionalGeneration.from_pretrained(FOLDER)
    ids = model.generate(pixels, max_new_tokens=30, eos_token_id=END)  # a text ends so
    print(AutoTokenizer.from_pretrained(FOLDER).decode(ids[0], skip_special_tokens=True))
""",
}
"""By the class of transformers."""


CODE = FamilyCode(
    build=Blip2,
    blocks=(VISION_BLOCK,),
    continued=continued,
    initial={"vision": towers.vision_from, "text": text_from, "language": language_from},
    transformers=Blip2Transformers(),
    original=Lavis(),
    ignored=IGNORED,
)
