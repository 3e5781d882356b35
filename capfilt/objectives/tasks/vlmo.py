"""VLMo's training as steps: on texts alone with all but the text experts frozen, then on pairs (VLMo section 3.3).

A step on pairs costs an image and a text pass of all blocks and one more of the last `fused` each, three fused passes
of ITM and one of MLM.
"""

from __future__ import annotations

import re

from torch import Tensor

from capfilt.models.vlmo.model import Vlmo
from capfilt.objectives.collectives import gather
from capfilt.objectives.interface import LossesAndMetrics, PairBatch, Task
from capfilt.objectives.kinds.vlmo import VlmoObjectives, VlmoTextObjectives
from capfilt.objectives.losses.info_nce import InfoNce, info_nce
from capfilt.objectives.losses.itm import global_negatives, itm
from capfilt.objectives.losses.mlm import mlm, num_hidden
from capfilt.objectives.losses.negatives import negative_weights
from capfilt.objectives.masking import Masked, whole_words

LEARNED_OF_TEXTS = re.compile(r"(text|modality|relative|mlm_head|norm)\..*|blocks\.\d+\.experts\.text\..*")
"""What texts alone train; attention, what images pass through and the other heads stay as they are."""


class VlmoTexts(Task):
    """A VLMo whose text experts learn to guess words of texts alone."""

    model: Vlmo
    config: VlmoTextObjectives

    def __init__(self, model: Vlmo, config: VlmoTextObjectives, prompt: int = 0):
        super().__init__(model, config, prompt)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(LEARNED_OF_TEXTS.fullmatch(name) is not None)

    def compute_losses(self, batch: PairBatch, progress: float) -> LossesAndMetrics:
        """MLM of the texts; images are not read."""
        hidden = hidden_words(self, batch.ids_BT)
        states = self.model.encode_text(hidden.ids_BT, batch.mask_BT)
        return {"mlm": mean_loss(self, self.model.guess_words(states), hidden)}, {}


class VlmoPretraining(Task):
    """A VLMo that learns to compare, to match and to guess words."""

    model: Vlmo
    config: VlmoObjectives

    def compute_losses(self, batch: PairBatch, progress: float) -> LossesAndMetrics:
        images, ids, mask, image_ids = batch
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        tokens = self.model.encode_image(images)
        context = self.model.image_context(tokens, "encoder")
        if "itc" in self.config.losses or "itm" in self.config.losses:
            loss, pairs = self.compare(tokens, ids, mask)
            if "itc" in self.config.losses:
                losses["itc"] = loss
        if "itm" in self.config.losses:
            drawn = self.draw(pairs, image_ids)
            wrong = global_negatives(self.model, tokens, ids, mask, image_ids, *drawn)
            loss, metrics["itm_accuracy"] = itm(self.model, ids, mask, context, wrong)
            losses["itm"] = loss * self.config.weight_of_mean(wrong.num_targets.to(loss.dtype))
        if "mlm" in self.config.losses:
            hidden = hidden_words(self, ids)
            losses["mlm"] = mean_loss(self, self.model.unmask(hidden.ids_BT, mask, context), hidden)
        return losses, metrics

    def compare(self, tokens: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, InfoNce]:
        """ITC, half of it behind the fused experts where the model has heads for that, and the other half with its
        scaled cosines."""
        model, gathered = self.model, self.config.gather_with_grad
        tail = "itc_fused" in model.config.outputs
        images, texts = model.image_vectors(tokens, tail), model.text_vectors(ids, mask, tail)
        first = info_nce(images[0], texts[0], model.logit_scale.exp(), False, gathered)
        if not tail:
            return first.loss, first
        fused = info_nce(images[1], texts[1], model.fused_logit_scale.exp(), False, gathered)
        return (first.loss + fused.loss) / 2, first

    def draw(self, pairs: InfoNce, image_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Of the rows of all processes a wrong image for each text and a wrong text for each image: the draws
        `wrong_images` and `wrong_texts`. A row that underflows draws evenly; the released code stops there."""
        every = gather(image_ids)
        wrong_images = negative_weights(pairs.text_to_image_BN, image_ids, every, epsilon=0.0)
        wrong_texts = negative_weights(pairs.image_to_text_BN, image_ids, every, epsilon=0.0)
        return self.draws.columns("wrong_images", wrong_images), self.draws.columns("wrong_texts", wrong_texts)


def hidden_words(task: VlmoTexts | VlmoPretraining, ids_BT: Tensor) -> Masked:
    """Texts with whole words hidden: the draw `masked`."""
    return task.masked(ids_BT, task.config.mask_rate, whole_words(task.model.config.max_positions))


def mean_loss(task: VlmoTexts | VlmoPretraining, logits: Tensor, hidden: Masked) -> Tensor:
    """MLM, weighted as the mean over what it is taken of."""
    loss = mlm(logits, hidden.labels_BT)
    return loss * task.config.weight_of_mean(num_hidden(hidden.labels_BT).to(loss.dtype))
