"""What architectures with a vision transformer and a text stack have in common.

`text.roles` names the parts that a model has of a BERT-like text stack: a captioner needs the decoder, a filter the
encoder. Other text stacks have no parts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

from capfilt.models.architecture import ArchitectureConfig, ModelRole, alias
from capfilt.models.layers.config import BertConfig, FusionTextConfig, Role, TextConfig, TextStackConfig, VisionConfig
from capfilt.models.layers.limits import Temperature, Width

if TYPE_CHECKING:
    from capfilt.data.text.language_tokenizer import TokenizerKind
    from capfilt.models.checkpoints.files import Tensors

PART_OF: dict[ModelRole, Role] = {"captioner": "decoder", "filter": "encoder"}
"""The part of the text stack that each role needs."""
_SHAPE = ("width", "depth", "heads", "hidden")


class VisionTextConfig(ArchitectureConfig):
    """An architecture whose YAML has the sections `vision` and `text`."""

    image_size_key: ClassVar[str] = "vision.image_size"

    vision: Any
    """What images pass through; each family has a class of its own."""
    text: Any
    """What texts pass through; likewise."""

    image_size: ClassVar[Any] = alias("vision.image_size")
    """Side of the square picture, pixels; of pictures that keep their shape the shortest."""
    vision_depth: ClassVar[Any] = alias("vision.depth")
    max_positions: ClassVar[Any] = alias("text.max_positions")

    @property
    def vocabulary_size(self) -> int:
        return self.text.vocab_size

    @property
    def num_weights(self) -> int:
        return self.vision.weights + self.text.weights

    @property
    def fused_width(self) -> int:
        return self.text.width if "fuse" in self.capabilities else 0

    @property
    def fused_init_std(self) -> float | None:
        return float(getattr(self.text, "init_std", 0.02))


class OneStackConfig(VisionTextConfig):
    """An architecture of one stack of blocks for images and texts, whose texts are embedded as BERT's (ViLT, VLMo)."""

    num_layers: ClassVar[Any] = alias("vision_depth")

    @property
    def towers(self) -> dict[str, dict[str, int | str]]:
        return {"vision": {name: getattr(self.vision, name) for name in (*_SHAPE, "patch_size")}}

    @property
    def tokenizer_kind(self) -> TokenizerKind:
        return "bert"


class TowersConfig(VisionTextConfig):
    """An architecture of two towers."""

    vision: VisionConfig
    """The vision tower."""
    text: TextStackConfig
    """The text stack."""

    @property
    def num_layers(self) -> int:
        return self.vision.depth + self.text.depth

    @property
    def towers(self) -> dict[str, dict[str, int | str]]:
        """The shape of each tower; a vision tower may be used at another picture size."""
        vision = {name: getattr(self.vision, name) for name in (*_SHAPE, "patch_size")}
        return {"vision": vision, "text": {name: getattr(self.text, name) for name in _SHAPE}}

    def for_role(self, role: ModelRole) -> Self:
        """The same with the one part of the text stack that a role needs, where it has that part."""
        if not isinstance(self.text, BertConfig) or PART_OF[role] not in self.text.roles:
            return self
        return self.changed(roles=(PART_OF[role],))

    def vocabulary_setting(self, entries: int) -> str:
        return f"text.vocab_size={self.text.vocab_size + entries - self.vocabulary_size}"

    def resize_positions(self, tensors: Tensors, antialias: bool = False) -> None:
        """Interpolate the vision tower's positions of a saved model to this picture size, in place."""
        from capfilt.models.layers.vit import resize_positions

        if "vision.positions" in tensors:
            tensors["vision.positions"] = resize_positions(
                tensors["vision.positions"], self.vision.image_size, self.vision.patch_size, antialias
            )


class ComparingConfig(TowersConfig):
    """Two towers that are compared, and a text stack of which some layers attend to images (BLIP, ALBEF, X-VLM)."""

    text: TextConfig | FusionTextConfig
    """The text stack."""
    projection: Width = 256
    """Width of the space where images and texts are compared."""
    temperature: Temperature = 0.07
    """Initial temperature of ITC; learned."""

    feature_width: ClassVar[Any] = alias("projection")

    @property
    def fusion_layers(self) -> range:
        return range(self.text.fusion_layer, self.text.depth) if "fuse" in self.capabilities else range(0)
