"""What models with a head on a base have alike: how they start from a base alone, and what FSDP cuts of any base."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from capfilt.models.architecture import ArchitectureConfig
from capfilt.models.checkpoints.files import Tensors
from capfilt.models.checkpoints.fill import load_whole
from capfilt.models.heads.config import HeadConfig
from capfilt.models.interface import InitialPart, Model
from capfilt.models.layers.block import Block
from capfilt.models.registry import FAMILIES, build, family_of


class HeadModel(Model):
    """A model on a base. Its tensors are those of the base, behind `base.`, and those of the head."""

    config: Any
    """A HeadConfig, of the family's class."""
    base: Model

    def __init__(self, config: HeadConfig):
        super().__init__()
        self.config = config
        self.base = build(config.base)

    @property
    def head_modules(self) -> list[nn.Module]:
        return [module for name, module in self.named_children() if name != "base"]

    def begin_head(self, tensors: Tensors) -> frozenset[str]:
        """Let parts of a fresh head begin with tensors of the saved base, or as parts of the base that was read; the
        names of these weights."""
        return frozenset()

    @property
    def vision_modules(self) -> list[nn.Module]:
        return self.base.vision_modules

    def encode_image(self, images_B3SS: Tensor) -> Tensor:
        """Pictures [B, 3, S, S], or as the base's family pads them -> image tokens [B, N, D]."""
        return self.base.encode_image(images_B3SS)

    def project_image(self, tokens_BND: Tensor) -> Tensor:
        """Image tokens -> unit vectors [B, P], as the base has them."""
        return self.base.project_image(tokens_BND)

    def recompute_vision(self, blocks: int) -> None:
        self.base.recompute_vision(blocks)

    def tied(self) -> dict[str, str]:
        return {f"base.{second}": f"base.{first}" for second, first in self.base.tied().items()}

    def adapt(self, tensors: Tensors) -> None:
        """Bring a saved model's tensors to this one's shapes, in place: positions of another picture size."""
        of_base = {name.removeprefix("base."): t for name, t in tensors.items() if name.startswith("base.")}
        self.base.adapt(of_base)
        tensors |= {f"base.{name}": tensor for name, tensor in of_base.items()}


def continued(config: HeadConfig, saved: ArchitectureConfig, tensors: Tensors, source: object) -> Model:
    """The saved model at the new picture size, with a fresh head where its classes are others; or from a base alone a
    model whose head is fresh.

    Raises:
        ModelError: tensors that are missing or of another shape.
    """
    make = family_of(config).code.build
    if saved.family == config.family:
        if saved.known_answers != config.known_answers and "head.0.weight" in tensors:
            # Other classes: a head of its own on all that the saved model has learned.
            head = {name: t for name, t in make(config).state_dict().items() if name.startswith("head.")}
            model = load_whole(make, config, tensors | head, source)
            model.filled = frozenset(tensors) - head.keys()
            return model
        return load_whole(make, config, tensors, source)
    code = family_of(config.base).code
    model, before = make(config), dict(tensors)
    assert isinstance(model, HeadModel), "a family of heads"
    modality = tensors.get("modality.weight")
    if modality is not None and len(modality) == 2 < 1 + getattr(config.base, "images", 1):
        # The second picture begins as the first (ViLT, VLMo).
        tensors["modality.weight"] = torch.cat([modality, modality[1:]])
        saved = saved.model_copy(update={"images": 2})
    if code.continued is None:
        model.base = load_whole(code.build, config.base, tensors, source)
    else:
        model.base = code.continued(config.base, saved, tensors, source)
    model.filled = frozenset(f"base.{name}" for name in before) | model.begin_head(before)
    return model


def parts_of_base(part: str) -> InitialPart:
    """What fills a part of the base of a new model from a checkpoint."""

    def fill(model: HeadModel, source: str) -> set[str]:
        return {f"base.{name}" for name in family_of(model.config.base).code.initial[part](model.base, source)}

    return fill


def blocks_of_families() -> tuple[Block, ...]:
    """The blocks of every family that can be a base, and so of any base."""
    bases = (family for family in FAMILIES.values() if not issubclass(family.config, HeadConfig))
    return tuple(dict.fromkeys(block for family in bases for block in family.code.blocks))


def relu_head(width: int, outputs: int) -> nn.Sequential:
    """A head of two layers with fresh weights as torch begins them."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs))


def norm_head(inputs: int, hidden: int, outputs: int, init_std: float | None) -> nn.Sequential:
    """A head of two layers, normalised in between, with fresh weights of this deviation; None: as torch begins them."""
    layers = nn.Sequential(nn.Linear(inputs, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, outputs))
    if init_std is not None:
        for layer in (layers[0], layers[3]):
            assert isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight, std=init_std)
            nn.init.zeros_(layer.bias)
    return layers
