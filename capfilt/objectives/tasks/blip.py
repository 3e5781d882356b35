"""BLIP's pretraining and fine-tuning: any of ITC, ITM and LM, computed together so that the image is encoded once.

BLIP's cost per step is one pass of the vision tower, one of its momentum copy, and the text stack over 1 (ITC) + 1
(momentum) + 3 (ITM) + 1 (LM) texts per pair; images are projected for cross-attention once for all of them when the
roles share it.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from capfilt.models.blip.model import Blip
from capfilt.models.layers.image_context import ImageContext
from capfilt.objectives.collectives import alone, gather, rank, world_size
from capfilt.objectives.config import ObjectivesConfig
from capfilt.objectives.grad_cache import CachedStep
from capfilt.objectives.interface import LossesAndMetrics, PairBatch, Precision, Task
from capfilt.objectives.losses.itc import TEMPERATURE_RANGE, itc, ramp
from capfilt.objectives.losses.itm import Negatives, Similarities, global_negatives, itm, local_negatives
from capfilt.objectives.losses.lm import lm, num_targets
from capfilt.objectives.losses.negatives import negative_weights
from capfilt.objectives.momentum import Momentum


class BlipPretraining(Task):
    """A BLIP, with its momentum copy and queues where ITC is minimised."""

    model: Blip
    config: ObjectivesConfig
    chunks_enter_model = True

    def __init__(self, model: Blip, config: ObjectivesConfig, prompt: int = 0):
        super().__init__(model, config, prompt)
        if config.has_momentum:
            by_image = config.itc_targets == "image"
            self.momentum = Momentum(model, config.momentum, config.queue, by_image)

    def compute_losses(self, batch: PairBatch, progress: float) -> LossesAndMetrics:
        images, ids, mask, image_ids = batch
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        tokens = self.model.encode_image(images)
        similar = None
        if self.momentum is not None:
            slow = self.momentum.features(images, ids, mask)
            image = self.model.project_image(tokens)
            text = self.model.project_text(self.model.encode_text(ids, mask))
            losses["itc"], similar = self.compare(image, text, slow, image_ids, progress)
        context = None
        if "itm" in self.config.losses:
            context = self.model.image_context(tokens, "encoder")
            wrong = self._negatives(self.draw(similar, image_ids), tokens, context, ids, mask, image_ids)
            losses["itm"], metrics["itm_accuracy"] = itm(self.model, ids, mask, context, wrong)
            losses["itm"] = losses["itm"] * self.config.weight_of_mean(wrong.num_targets.to(losses["itm"].dtype))
        if "lm" in self.config.losses:
            if context is None or not self.model.shares_image_context:
                context = self.model.image_context(tokens, "decoder")
            logits = self.model.decode(ids, mask, context)
            losses["lm"] = lm(logits, ids, mask, self.prompt, smoothing=self.config.smoothing)
            targets = num_targets(ids, mask, self.prompt).to(losses["lm"].dtype)
            losses["lm"] = losses["lm"] * self.config.weight_of_mean(targets)
        return losses, metrics

    def before_step(self) -> None:
        """Keep the temperature in its range, and move the momentum copy towards the model."""
        if self.momentum is not None:
            with torch.no_grad():
                self.model.temperature.clamp_(*TEMPERATURE_RANGE)
        super().before_step()

    def compare(
        self, image: Tensor, text: Tensor, slow: tuple[Tensor, Tensor], image_ids: Tensor, progress: float
    ) -> tuple[Tensor, Similarities]:
        """ITC of online and momentum features [B, P], and what ITM draws by; then the momentum features are queued."""
        assert self.momentum is not None
        config, queued, own_keys = self.config, self.momentum.queue_groups, self.config.itc_keys == "rank"
        with alone() if own_keys else nullcontext():
            pairs = itc(
                image,
                text,
                *slow,
                self.momentum.queue_image.clone(),
                self.momentum.queue_text.clone(),
                self.model.temperature,
                ramp(progress, config.alpha, config.alpha_ramp) if self.alpha is None else self.alpha,
                None if queued is None else (image_ids, queued.clone()),
            )
        if self.training:
            self.momentum.enqueue(*slow, image_ids)
        if config.negatives_by == "online":
            return pairs.loss, self._similarities(image, text, image, text)
        if own_keys and config.negatives == "all":
            return pairs.loss, self._similarities(image, text, *slow)
        return pairs.loss, (pairs.image_to_text_BN, pairs.text_to_image_BN)

    @torch.no_grad()
    def _similarities(self, image: Tensor, text: Tensor, keys_image: Tensor, keys_text: Tensor) -> Similarities:
        """Of this process's features [B, P] to the keys of all, over the temperature."""
        with torch.autocast(image.device.type, enabled=False):  # as `itc` does
            to_text, to_image = image @ gather(keys_text).T, text @ gather(keys_image).T
            return to_text / self.model.temperature, to_image / self.model.temperature

    def draw(self, similar: Similarities | None, image_ids: Tensor) -> tuple[Tensor, Tensor]:
        """A wrong image for each text and a wrong text for each image, two of [B] indices: the draws `wrong_images`
        and `wrong_texts`."""
        B, config = image_ids.shape[0], self.config
        if similar is None:  # without ITC there are no similarities: any other image is as good
            even = image_ids.new_zeros(B, B * world_size(), dtype=torch.float32)
            similar = even, even
        to_text, to_image = similar
        among = gather(image_ids) if config.negatives == "all" else image_ids
        if config.negatives == "rank" and to_text.shape[1] > B:
            local = slice(rank() * B, rank() * B + B)
            to_text, to_image = to_text[:, local], to_image[:, local]
        wrong_images = negative_weights(to_image, image_ids, among, config.negatives_epsilon)
        wrong_texts = negative_weights(to_text, image_ids, among, config.negatives_epsilon)
        return self.draws.columns("wrong_images", wrong_images), self.draws.columns("wrong_texts", wrong_texts)

    def _negatives(
        self,
        drawn: tuple[Tensor, Tensor],
        tokens: Tensor,
        context: ImageContext,
        ids: Tensor,
        mask: Tensor,
        image_ids: Tensor,
    ) -> Negatives:
        if self.config.negatives == "all":
            return global_negatives(self.model, tokens, ids, mask, image_ids, *drawn)
        return local_negatives(ids, mask, context, image_ids, *drawn)

    def backward_in_chunks(
        self, batch: PairBatch, progress: float, chunks: int, precision: Precision
    ) -> LossesAndMetrics:
        """The gradients of the whole batch with the memory of a chunk, by cached features (`grad_cache`)."""
        if self.config.negatives == "all":
            return super().backward_in_chunks(batch, progress, chunks, precision)
        return CachedStep(self, batch, batch.chunks(chunks), precision).backward(progress)
