"""X-VLM's architecture as a YAML of `models/xvlm/` describes it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from capfilt.data.text.language_tokenizer import TokenizerKind
from capfilt.models.architecture import ModelRole
from capfilt.models.layers.config import FusionTextConfig, SwinConfig, VisionConfig
from capfilt.models.layers.towers import PART_OF, ComparingConfig

if TYPE_CHECKING:
    from capfilt.models.checkpoints.files import Tensors


class RegionVitConfig(VisionConfig):
    """A ViT, whose last blocks run over regions too: CLIP's (with `pre_norm`, as OpenAI's ViT-B/16) or DeiT's."""

    region_blocks: int = Field(default=4, ge=1)
    """How many of the last blocks run over regions; X-VLM: 4 of 12."""

    @model_validator(mode="after")
    def _enough_blocks(self) -> RegionVitConfig:
        if self.region_blocks > self.depth:
            raise ValueError(f"region_blocks is {self.region_blocks}, and the tower has {self.depth} blocks")
        return self


def _tower(vision: Any) -> str:
    """The class of a section `vision`: a Swin is given by the width of its first stage, a ViT by that of all."""
    swin = not vision.keys() & {"width", "depth"} if isinstance(vision, Mapping) else isinstance(vision, SwinConfig)
    return "SwinConfig" if swin else "RegionVitConfig"


VisionSection = Annotated[
    Annotated[SwinConfig, Tag("SwinConfig")] | Annotated[RegionVitConfig, Tag("RegionVitConfig")],
    Discriminator(_tower),
]


class XvlmConfig(ComparingConfig):
    """An architecture of the family: what a YAML of `models/xvlm/` says (X-VLM section 3.1)."""

    family: Literal["xvlm"] = "xvlm"
    vision: VisionSection  # type: ignore[assignment]
    """The vision tower: a Swin (`embed`, `depths`, `stage_heads`) or a ViT (`width`, `depth`, `heads`)."""
    text: FusionTextConfig

    @property
    def capabilities(self) -> frozenset[str]:
        """What a model can do: a pretrained one guesses hidden words and finds regions, which a filter does not; a
        captioner writes and does nothing else."""
        roles = set(self.text.roles)
        if roles == {"decoder"}:
            return frozenset({"encode_image", "decode"})
        pretrained = {"unmask", "ground"} if "decoder" in roles else set()
        return frozenset({"encode_image", "encode_text", "fuse"} | pretrained)

    @property
    def compares(self) -> bool:
        """Whether a model has the heads that compare and match."""
        return "encoder" in self.text.roles

    @property
    def grounds(self) -> bool:
        """Whether a model has the head that says where in an image a text is."""
        return "ground" in self.capabilities

    @property
    def tokenizer_kind(self) -> TokenizerKind:
        """BERT's, without [SEP] but for a captioner, which ends with it."""
        return "open-bert" if self.compares else "closed-bert"

    @property
    def fused_init_std(self) -> None:
        """Heads of tasks begin as torch begins a layer (`build_mlp` of X-VLM's code)."""
        return None

    @property
    def image_grid(self) -> int:
        return math.isqrt(self.vision.num_tokens - 1)

    @property
    def towers(self) -> dict[str, dict[str, int | str]]:
        if not isinstance(self.vision, SwinConfig):
            towers = super().towers
            return {**towers, "vision": {**towers["vision"], "activation": self.vision.activation}}
        stages = {f"depth_{n}": depth for n, depth in enumerate(self.vision.depths)}
        heads = {f"heads_{n}": heads for n, heads in enumerate(self.vision.stage_heads)}
        text = {name: getattr(self.text, name) for name in ("width", "depth", "heads", "hidden")}
        return {
            "vision": {"embed": self.vision.embed, **stages, **heads, "patch_size": self.vision.patch_size},
            "text": text,
        }

    def for_role(self, role: ModelRole) -> Self:
        """The same with the one part of the text stack that a role needs, and without the heads of pretraining."""
        return self.changed(roles=(PART_OF[role],))

    def resize_positions(self, tensors: Tensors, antialias: bool = False) -> None:
        """Bring a saved model's tower to this picture size, in place: a Swin's tables of offsets, a ViT's positions."""
        if not isinstance(self.vision, SwinConfig):
            return super().resize_positions(tensors, antialias)
        from capfilt.models.layers.swin import resize_windows

        resize_windows(tensors, self.vision.window, "vision.")
