"""The box of a phrase beside the whole picture, by the head that a pretrained model has for it."""

from __future__ import annotations

import torch

from capfilt.data.loading.loader import Batch
from capfilt.data.loading.phrase_rows import PhraseRows
from capfilt.objectives.interface import BoxBatch, LossesAndMetrics, Task
from capfilt.objectives.kinds.downstream import GroundingObjectives
from capfilt.objectives.losses.boxes import box_losses, corners_of, iou


class Grounding(Task):
    """A model and the losses of its boxes."""

    config: GroundingObjectives
    several_kinds = True  # the heads of pretraining have no part in it

    def batch_of(self, loaded: Batch) -> BoxBatch:
        assert isinstance(loaded, PhraseRows), "the loader of the task's rows"
        return BoxBatch(loaded.images, loaded.ids, loaded.mask, loaded.image_ids, loaded.boxes)

    def example(self, pairs: int, tokens: int) -> BoxBatch:
        return BoxBatch(*super().example(pairs, tokens)[:4], torch.full((pairs, 4), 0.5))

    def compute_losses(self, batch: BoxBatch, progress: float) -> LossesAndMetrics:
        model = self.model
        context = model.image_context(model.encode_image(batch.images), "encoder")
        boxes = model.predict_box(model.fuse(batch.ids_BT, batch.mask_BT, context))
        every = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
        box, giou = box_losses(boxes, batch.boxes_B4, every)
        fits = iou(corners_of(boxes.detach()), corners_of(batch.boxes_B4.to(boxes.dtype))) >= 0.5
        return {"box": box, "giou": giou}, {"box_accuracy": fits.float().mean()}
