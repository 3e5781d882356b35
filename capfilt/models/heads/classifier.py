"""A classifier of texts beside images: a head on the first state of what any fusing model fuses."""

from __future__ import annotations

from torch import Tensor

from capfilt.models.heads.base import HeadModel, mlp
from capfilt.models.heads.config import ClassifierConfig
from capfilt.models.interface import Model


class Classifier(HeadModel):
    """Classes of texts beside images (ALBEF section 5, visual entailment; ViLT section 4.3, VQA)."""

    config: ClassifierConfig
    entry_points = (*Model.entry_points, "classify")

    def __init__(self, config: ClassifierConfig):
        super().__init__(config)
        self.head = mlp(config.head_kind, config.base.fused_width, len(config.labels), config.base.fused_init_std)

    def classify(self, tokens_BND: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Texts beside the image tokens of a picture each -> logits [B, labels]."""
        context = self.base.image_context(tokens_BND, "encoder")
        logits: Tensor = self.head(self.base.summary(self.base.fuse(ids_BT, mask_BT, context)))
        return logits
