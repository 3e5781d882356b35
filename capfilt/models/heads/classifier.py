"""A classifier of texts beside images: a head on the first state of what any fusing model fuses.

Of two pictures a text, which NLVR2 has, each family joins what it sees in its own way (`pairs.py`).
"""

from __future__ import annotations

from torch import Tensor, nn

from capfilt.models.checkpoints.files import Tensors
from capfilt.models.heads.base import HeadModel, norm_head, relu_head
from capfilt.models.heads.config import ClassifierConfig
from capfilt.models.heads.pairs import Joined, pair_of
from capfilt.models.interface import Model


class Classifier(HeadModel):
    """Classes of texts beside images (ALBEF section 5, visual entailment and NLVR2; ViLT section 4.3, VQA)."""

    config: ClassifierConfig
    entry_points = (*Model.entry_points, "classify")

    def __init__(self, config: ClassifierConfig):
        super().__init__(config)
        assert config.labels, "whoever builds a classifier knows its classes"
        self.pair: nn.Module | None = pair_of(self.base) if config.images == 2 else None
        joined = isinstance(self.pair, Joined)
        inputs = config.base.fused_width * (2 if joined else 1)
        if config.head_kind == "relu":
            self.head = relu_head(inputs, len(config.labels))
        else:
            wide = inputs if joined else 2 * inputs
            self.head = norm_head(inputs, wide, len(config.labels), config.base.fused_init_std)

    @property
    def matrices(self) -> tuple[str, ...]:
        """The norm of the head, which decays in the codes of ViLT, VLMo and X-VLM: they spare norms by names that it
        has not."""
        return ("head.1.weight",) if self.config.head_kind == "norm" else ()

    def begin_head(self, tensors: Tensors) -> frozenset[str]:
        """What attends to the second picture begins as what attends to the first; layers that merge are fresh."""
        if self.pair is None:
            return frozenset()
        self.pair.load_state_dict(pair_of(self.base).state_dict())
        return frozenset(f"pair.{name}" for name in self.pair.state_dict() if not name.startswith("merges."))

    def encode_image(self, images_B3SS: Tensor) -> Tensor:
        """Pictures [B, 3, S, S], or as the base's family pads them -> image tokens [B, N, D]; of two pictures a text,
        the left ones are the first half."""
        if isinstance(self.pair, Joined):
            return self.pair.encode_image(self.base, images_B3SS)
        return self.base.encode_image(images_B3SS)

    def classify(self, tokens_BND: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Texts beside the image tokens of a picture each, or of two: then [2 B, N, D], the left ones first -> logits
        [B, labels]."""
        if self.pair is not None:
            vector = self.pair(self.base, tokens_BND, ids_BT, mask_BT)
        else:
            context = self.base.image_context(tokens_BND, "encoder")
            vector = self.base.summary(self.base.fuse(ids_BT, mask_BT, context))
        return self.head(vector)
