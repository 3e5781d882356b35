"""CLIP's pretraining: images and texts of a batch compared, each with all (arXiv 2103.00020, section 2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from capfilt.models.clip.model import Clip
from capfilt.objectives.collectives import rank
from capfilt.objectives.grad_cache import backward_through_features
from capfilt.objectives.interface import LossesAndMetrics, PairBatch, Precision, Task
from capfilt.objectives.kinds.clip import ClipObjectives
from capfilt.objectives.losses.info_nce import info_nce


class ClipPretraining(Task):
    """A CLIP whose towers and scale are learned."""

    model: Clip
    config: ClipObjectives
    chunks_enter_model = True

    def compute_losses(self, batch: PairBatch, progress: float) -> LossesAndMetrics:
        return self.compare(*self.features(batch), batch.image_ids_B)

    def features(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Unit vectors of images and of texts, two of [B, P]."""
        image = self.model.project_image(self.model.encode_image(batch.images))
        return image, self.model.project_text(self.model.encode_text(batch.ids_BT, batch.mask_BT))

    def compare(self, image_BP: Tensor, text_BP: Tensor, image_ids_B: Tensor) -> LossesAndMetrics:
        """The loss of unit vectors, and how often the right text of all is the nearest."""
        config, scale = self.config, self.model.logit_scale.exp()
        ids = image_ids_B if config.itc_targets == "image" else None
        pairs = info_nce(image_BP, text_BP, scale, config.local_loss, config.gather_with_grad, ids)
        right = torch.arange(len(image_BP), device=image_BP.device) + rank() * len(image_BP)
        nearest = (pairs.image_to_text_BN.argmax(dim=1) == right).float().mean()
        return {"itc": pairs.loss}, {"itc_accuracy": nearest, "scale": scale.detach()}

    def before_step(self) -> None:
        """Keep the scale in its range."""
        with torch.no_grad():
            self.model.logit_scale.clamp_(0.0, math.log(self.config.max_scale))

    def after_step(self) -> None:
        """Keep the scale in its range in what is saved, too."""
        self.before_step()

    def backward_in_chunks(
        self, batch: PairBatch, progress: float, chunks: int, precision: Precision
    ) -> LossesAndMetrics:
        """The gradients of the whole batch with the memory of a chunk, by cached features; open_clip's accum-freq."""
        self.before_step()
        return backward_through_features(self, batch, chunks, precision)
