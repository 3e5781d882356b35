"""What a pretraining begins from: an ImageNet ViT and BERT, as in the paper (BLIP, section 4.1), from files or the hub.

Which parts of a model can begin so, and what of them starts fresh, each family says (`Family.initial`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from capfilt.config import Config
from capfilt.errors import ModelError
from capfilt.models.registry import family_of

if TYPE_CHECKING:
    from capfilt.models.interface import Model


class InitialConfig(Config):
    """Where the first weights of a new model come from; what is not given starts from random ones."""

    vision: str | None = None
    """A ViT of timm, DeiT or transformers, for X-VLM a Swin or a CLIP, by its tower: a folder, a file, one on a store,
    or a name on the hub. The paper: facebook/deit-base-patch16-224; timm/vit_large_patch16_224.augreg_in21k for
    ViT-L."""
    text: str | None = None
    """A BERT of transformers, likewise. The paper: google-bert/bert-base-uncased."""
    language: str | None = None
    """BLIP-2's stage 2: an OPT or Flan-T5 of transformers, a folder or a hub name. It may stand beside `start`."""

    def located(self) -> InitialConfig:
        """The same with every path in full: a worker may start in another folder."""
        given = self.model_dump(exclude_none=True)
        return InitialConfig(**{k: str(Path(v).absolute()) if Path(v).exists() else v for k, v in given.items()})


def initialise(
    model: Model, vision: str | None = None, text: str | None = None, language: str | None = None
) -> set[str]:
    """Fill a new model's parts from checkpoints, in place; returns the names of the tensors that came from them.

    Raises:
        ModelError: a checkpoint that is not there, or does not fit, or a part that the model does not have.
    """
    filled: set[str] = set()
    parts = family_of(model.config).code.initial
    for part, source in (("vision", vision), ("text", text), ("language", language)):
        if source is None:
            continue
        if part not in parts:
            what = "language model" if part == "language" else f"{part} tower that begins with another's weights"
            raise ModelError(f"initial.{part} is {source}, and the architecture has no {what}: leave it out")
        filled |= parts[part](model, source)
    model.filled |= filled
    return filled
