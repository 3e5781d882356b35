"""X-VLM's pretraining: ITC, ITM and MLM of pairs, and of regions, with where these are (X-VLM section 3.2).

A step is of one or of the other. A region's texts are compared with its part of the picture and fused with nothing
else; where it is, is told beside the whole picture. A picture is encoded once, whatever the number of its regions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from capfilt.data.loading.loader import Batch
from capfilt.data.loading.regions import RegionRows
from capfilt.models.layers.image_context import ImageContext
from capfilt.models.xvlm.model import Regions, Xvlm
from capfilt.objectives.interface import LossesAndMetrics, PairBatch, RegionBatch, Task
from capfilt.objectives.kinds.xvlm import BOXES, XvlmObjectives
from capfilt.objectives.losses.boxes import box_losses
from capfilt.objectives.losses.info_nce import InfoNce, info_nce
from capfilt.objectives.losses.itc import TEMPERATURE_RANGE
from capfilt.objectives.losses.itm import itm, local_negatives
from capfilt.objectives.losses.lm import lm, num_targets
from capfilt.objectives.losses.mlm import mlm, num_hidden
from capfilt.objectives.losses.negatives import negative_weights
from capfilt.objectives.masking import IGNORED, whole_ngrams


class XvlmPretraining(Task):
    """An X-VLM and the losses of its heads."""

    model: Xvlm
    config: XvlmObjectives
    several_kinds = True

    def before_step(self) -> None:
        """Keep the temperature in its range where the model is pretrained; fine-tunings leave it."""
        if "mlm" in self.config.losses:
            with torch.no_grad():
                self.model.temperature.clamp_(*TEMPERATURE_RANGE)

    def batch_of(self, loaded: Batch) -> PairBatch | RegionBatch:
        """What the loader read: pairs, or regions."""
        pairs = loaded.images, loaded.ids, loaded.mask, loaded.image_ids
        if not isinstance(loaded, RegionRows):
            return PairBatch(*pairs)
        return RegionBatch(*pairs, loaded.image, loaded.seen, loaded.boxes, loaded.is_region)

    def compute_losses(self, batch: PairBatch | RegionBatch, progress: float) -> LossesAndMetrics:
        if isinstance(batch, PairBatch):
            tokens = self.model.encode_image(batch.images)
            if "lm" in self.config.losses:
                return {"lm": self._lm(tokens, batch)}, {}
            states = self.model.encode_text(batch.ids_BT, batch.mask_BT)
            return self._pairs(tokens, states, self.model.image_context(tokens, "encoder"), batch)
        regions = Regions(batch.image_R, batch.seen_RN)
        parts, whole = self.model.encode_regions(batch.images, regions)
        states = self.model.encode_text(batch.ids_BT, batch.mask_BT)
        losses, metrics = self._pairs(parts, states, self.model.region_context(parts, regions), batch)
        if BOXES & self.config.losses.keys():
            context = self.model.image_context(whole, "encoder")
            boxes = self.model.predict_box(self.model.fuse_states(states, batch.mask_BT, context))
            box, giou = box_losses(boxes, batch.boxes_R4, batch.is_region_R)
            weight = self.config.weight_of_mean(batch.is_region_R.sum().to(box.dtype))
            losses |= {"box": box * weight, "giou": giou * weight}
        return losses, metrics

    def _pairs(
        self, tokens: Tensor, states: Tensor, context: ImageContext, batch: PairBatch | RegionBatch
    ) -> LossesAndMetrics:
        """What is learned of texts, read alone as `states`, beside whole images and beside parts of them alike."""
        ids, mask, wanted = batch.ids_BT, batch.mask_BT, self.config.losses.keys()
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        if wanted & {"itc", "itm"}:
            by_image = self.config.itc_targets == "image"
            # By pair: two texts of one image are wrong for each other, as those of its regions are.
            image_ids = batch.image_ids_B if by_image else torch.arange(len(ids), device=ids.device)
            features = self.model.project_image(tokens), self.model.project_text(states)
        if "itc" in wanted:
            losses["itc"] = self._compare(*features, image_ids if by_image else None).loss
        if "itm" in wanted:
            wrong = local_negatives(states, mask, context, image_ids, *self._draw(*features, image_ids))
            loss, metrics["itm_accuracy"] = itm(self.model, states, mask, context, wrong, self.model.fuse_states)
            losses["itm"] = loss * self.config.weight_of_mean(wrong.num_targets.to(loss.dtype))
        if "mlm" in wanted:
            losses["mlm"] = self._mlm(ids, mask, context)
        return losses, metrics

    def _compare(self, image_BP: Tensor, text_BP: Tensor, image_ids: Tensor | None) -> InfoNce:
        """ITC of the rows of all processes; each has the gradients of its own, or of all."""
        every = self.config.itc_gradients == "all"
        return info_nce(image_BP, text_BP, 1 / self.model.temperature, False, every, image_ids)

    @torch.no_grad()
    def _draw(self, image_BP: Tensor, text_BP: Tensor, image_ids: Tensor) -> tuple[Tensor, Tensor]:
        """A wrong image for each text and a wrong text for each image: the draws `wrong_images` and `wrong_texts`."""
        with torch.autocast(image_BP.device.type, enabled=False):
            similar = image_BP @ text_BP.T / self.model.temperature
        images, texts = (
            negative_weights(rows, image_ids, image_ids, self.config.epsilon) for rows in (similar.T, similar)
        )
        return self.draws.columns("wrong_images", images), self.draws.columns("wrong_texts", texts)

    def _mlm(self, ids: Tensor, mask: Tensor, context: ImageContext) -> Tensor:
        """The loss of hidden tokens, of which alone there are logits."""
        config = self.config
        hidden = self.masked(ids, config.mask_rate, whole_ngrams(config.max_masks, config.ngrams))
        most = min(config.max_masks, ids.shape[1])
        places = (hidden.labels_BT != IGNORED).long().argsort(dim=1, descending=True, stable=True)[:, :most]
        labels = hidden.labels_BT.gather(1, places)
        loss = mlm(self.model.fuse_hidden(hidden.ids_BT, mask, context, places), labels)
        return loss * config.weight_of_mean(num_hidden(labels).to(loss.dtype))

    def _lm(self, tokens: Tensor, batch: PairBatch) -> Tensor:
        """The loss of writing the texts behind the prompt."""
        logits = self.model.decode(batch.ids_BT, batch.mask_BT, self.model.image_context(tokens, "decoder"))
        loss = lm(logits, batch.ids_BT, batch.mask_BT, self.prompt, self.config.smoothing)
        # X-VLM's smoothing gives every word smoothing / V and the right one 1 - smoothing, torch's the sum of both.
        plain = lm(logits, batch.ids_BT, batch.mask_BT, self.prompt, 0.0)
        loss = loss - self.config.smoothing / logits.shape[2] * plain
        return loss * self.config.weight_of_mean(num_targets(batch.ids_BT, batch.mask_BT, self.prompt).to(loss.dtype))
