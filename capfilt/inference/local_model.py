"""A model in this process with what lies beside its weights: its tokenizer, and how it wants its pictures."""

from __future__ import annotations

import torch
from torch import Tensor

from capfilt.data.images.preprocess import BLIP_PREPROCESS, ImageFormat, Preprocess
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.inference.batches import Images
from capfilt.inference.roles import preprocess_for, tokenizer_for
from capfilt.models import Model
from capfilt.models.checkpoints import store
from capfilt.models.layers.packed_linear import pack
from capfilt.storage.paths import StoragePath


class LocalModel:
    """What a role is played with. Several may share what they compute from images (`share_vision`)."""

    def __init__(self, model: Model, tokenizer: Tokenizer, preprocess: Preprocess = BLIP_PREPROCESS):
        self.model, self.tokenizer = model, tokenizer
        pack(model)
        self.image_format = ImageFormat(model.config.image_size, preprocess)
        self.tokens_name: object = object()
        """Under which its image tokens are kept in a batch of images."""

    @classmethod
    def load(cls, folder: StoragePath, device: torch.device, dtype: torch.dtype | None = None) -> LocalModel:
        """A saved model, in eval mode; frozen parts are held in `dtype`. Raises as `store.load`."""
        model = store.load(folder, dtype).eval().to(device)
        return cls(model, tokenizer_for(folder, model.config), preprocess_for(folder, model.config))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def image_tokens(self, images: Images) -> Tensor:
        """The tokens of images [B, N, D], computed once for each batch."""
        return images.once(self.tokens_name, lambda: self.model.encode_image(images.pixels(self.image_format)))

    def share_vision(self, other: LocalModel) -> bool:
        """Take image tokens from `other`, if it makes the same of the same pictures; returns whether it does."""
        same = self.image_format == other.image_format and same_vision(self.model, other.model)
        if same:
            self.tokens_name = other.tokens_name
        return same


def same_vision(a: Model, b: Model) -> bool:
    """Whether two models of one kind encode an image with equal weights."""
    return type(a) is type(b) and same_modules(a.vision_modules, b.vision_modules)


def same_modules(one: list[torch.nn.Module] | None, two: list[torch.nn.Module] | None) -> bool:
    """Whether two lists hold modules of equal weights and epsilons; not where a model names none to compare."""
    if not one or not two or len(one) != len(two):
        return False
    return all(_same(a, b) for a, b in zip(one, two, strict=True))


def _same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    if _epsilons(a) != _epsilons(b):
        return False
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def _epsilons(module: torch.nn.Module) -> list[float]:
    return [part.eps for part in module.modules() if isinstance(part, torch.nn.LayerNorm)]
