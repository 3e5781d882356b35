"""ALBEF's pretraining: ITC, ITM and MLM, with targets from a momentum copy of the whole model (ALBEF section 3).

A step costs one pass of the vision tower and one of its copy, the text layers over 2 (ITC, MLM) + 2 (the copy) texts a
pair, and the fusion layers over 3 (ITM) + 1 (MLM) + 1 (the copy).
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from capfilt.models.albef.model import Albef
from capfilt.objectives.collectives import alone, rank, world_size
from capfilt.objectives.interface import LossesAndMetrics, PairBatch, Task
from capfilt.objectives.kinds.albef import AlbefObjectives
from capfilt.objectives.losses.itc import TEMPERATURE_RANGE, Itc, itc, ramp
from capfilt.objectives.losses.itm import Similarities, itm, local_negatives
from capfilt.objectives.losses.mlm import mlm, num_hidden
from capfilt.objectives.losses.negatives import negative_weights
from capfilt.objectives.masking import single_tokens
from capfilt.objectives.momentum import Momentum


class AlbefPretraining(Task):
    """An ALBEF and its momentum copy, the head that guesses hidden words included."""

    model: Albef
    config: AlbefObjectives
    momentum: Momentum

    def __init__(self, model: Albef, config: AlbefObjectives, prompt: int = 0):
        super().__init__(model, config, prompt)
        self.momentum = Momentum(model, config.momentum, config.queue, config=model.config)

    def before_step(self) -> None:
        """Keep the temperature in its range, and move the momentum copy towards the model."""
        with torch.no_grad():
            self.model.temperature.clamp_(*TEMPERATURE_RANGE)
        super().before_step()

    def compute_losses(self, batch: PairBatch, progress: float) -> LossesAndMetrics:
        images, ids, mask, image_ids = batch
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        alpha = ramp(progress, self.config.alpha, self.config.alpha_ramp) if self.alpha is None else self.alpha
        tokens = self.model.encode_image(images)
        context = self.model.image_context(tokens, "encoder")
        with torch.no_grad():
            slow_tokens = self.momentum.model.encode_image(images)
        if "itc" in self.config.losses or "itm" in self.config.losses:
            states = self.model.encode_text(ids, mask)
            pairs = self._compare(tokens, states, slow_tokens, ids, mask, alpha)
            if "itc" in self.config.losses:
                losses["itc"] = pairs.loss
        if "itm" in self.config.losses:
            similar = pairs.image_to_text_BN, pairs.text_to_image_BN
            wrong = local_negatives(states, mask, context, image_ids, *self._draw(similar, image_ids))
            loss, metrics["itm_accuracy"] = itm(self.model, states, mask, context, wrong, self.model.fuse_states)
            losses["itm"] = loss * self.config.weight_of_mean(wrong.num_targets.to(loss.dtype))
        if "mlm" in self.config.losses:
            hidden = self.masked(ids, self.config.mask_rate, single_tokens)
            with torch.no_grad():
                slow = self.momentum.model
                guesses = slow.unmask(hidden.ids_BT, mask, slow.image_context(slow_tokens, "encoder"))
            logits = self.model.unmask(hidden.ids_BT, mask, context)
            loss = mlm(logits, hidden.labels_BT, guesses, alpha)
            losses["mlm"] = loss * self.config.weight_of_mean(num_hidden(hidden.labels_BT).to(loss.dtype))
        return losses, metrics

    def _compare(
        self, tokens: Tensor, states: Tensor, slow_tokens: Tensor, ids: Tensor, mask: Tensor, alpha: float
    ) -> Itc:
        """ITC with momentum keys, which are queued afterwards."""
        slow = self.momentum.model
        with torch.no_grad():
            keys = slow.project_image(slow_tokens), slow.project_text(slow.encode_text(ids, mask))
        with alone() if self.config.itc_keys == "rank" else nullcontext():
            pairs = itc(
                self.model.project_image(tokens),
                self.model.project_text(states),
                *keys,
                self.momentum.queue_image.clone(),
                self.momentum.queue_text.clone(),
                self.model.temperature,
                alpha,
            )
        if self.training:
            self.momentum.enqueue(*keys)
        return pairs

    def _draw(self, similar: Similarities, image_ids: Tensor) -> tuple[Tensor, Tensor]:
        """A wrong image for each text and a wrong text for each image: the draws `wrong_images` and `wrong_texts`."""
        B = image_ids.shape[0]
        start = rank() * B if similar[0].shape[1] == B * world_size() else 0  # keys of all, or its own
        to_text, to_image = (similarity[:, start : start + B] for similarity in similar)
        wrong_images = negative_weights(to_image, image_ids, image_ids, epsilon=0.0)
        wrong_texts = negative_weights(to_text, image_ids, image_ids, epsilon=0.0)
        return self.draws.columns("wrong_images", wrong_images), self.draws.columns("wrong_texts", wrong_texts)
