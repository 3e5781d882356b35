"""BLIP-2's two stages as training steps (BLIP-2 sections 3.2 and 3.3).

Stage 1 computes ITC, ITM and LM of the Q-Former itself: one pass of the frozen tower and of the queries for all three,
for the decoder goes on from the queries' states that ITC compares. Stage 2 computes LM of the frozen language model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from capfilt.errors import RecipeError
from capfilt.models.blip2.model import Blip2
from capfilt.objectives.collectives import all_reduce_sum, gather, world_size
from capfilt.objectives.config import ObjectivesConfig
from capfilt.objectives.interface import LossesAndMetrics, PairBatch, Precision, Task
from capfilt.objectives.kinds.blip2 import vanishing
from capfilt.objectives.losses.itc_queries import itc_queries
from capfilt.objectives.losses.itm import Similarities, global_negatives, itm
from capfilt.objectives.losses.lm import answered, lm, num_targets
from capfilt.objectives.losses.negatives import negative_weights_among_others


def exclude_frozen(task: nn.Module) -> None:
    """Keep frozen weights out of a task's `state_dict`: a resumed training begins with the same ones, read again."""
    task.register_state_dict_post_hook(_without_frozen)
    task.register_load_state_dict_post_hook(_nothing_missing)


def _frozen(task: nn.Module) -> set[str]:
    return {name for name, p in task.named_parameters(remove_duplicate=False) if not p.requires_grad}


def _without_frozen(task: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    for name in _frozen(task):
        state.pop(prefix + name, None)


def _nothing_missing(task: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = sorted(set(keys.missing_keys) - _frozen(task))


class Blip2Stage1(Task):
    """A Q-Former that learns to compare, to match and to decode."""

    model: Blip2
    config: ObjectivesConfig

    def __init__(self, model: Blip2, config: ObjectivesConfig, prompt: int = 0):
        super().__init__(model, config, prompt)
        exclude_frozen(self)

    def compute_losses(self, batch: PairBatch, progress: float) -> LossesAndMetrics:
        images, ids, mask, image_ids = batch
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        tokens = self.model.encode_image(images)
        keys = self.model.image_context(tokens, "encoder")
        states, seen = self.model.text.run_queries(keys)
        B = ids.shape[0]
        even = tokens.new_zeros(B, B * world_size())
        similar: Similarities = even, even  # without ITC any other image is as good
        if "itc" in self.config.losses:
            image = self.model.project_queries(states)
            text = self.model.project_text(self.model.encode_text(ids, mask))
            same_image = image_ids if self.config.itc_targets == "image" else None
            detached = self.config.itc_keys == "detached"
            pairs = itc_queries(image, text, self.model.temperature, self.config.smoothing, same_image, detached)
            losses["itc"], similar = pairs.loss, (pairs.image_to_text_BN, pairs.text_to_image_BN)
        if "itm" in self.config.losses:
            drawn = self.draw(similar, image_ids)
            wrong = global_negatives(self.model, tokens, ids, mask, image_ids, *drawn)
            losses["itm"], metrics["itm_accuracy"] = itm(self.model, ids, mask, keys, wrong)
            losses["itm"] = losses["itm"] * self.config.weight_of_mean(wrong.num_targets.to(losses["itm"].dtype))
        if "lm" in self.config.losses:
            logits = self.model.decode(ids, mask, seen)
            losses["lm"] = lm(logits, ids, mask, self.prompt, smoothing=self.config.smoothing)
            targets = num_targets(ids, mask, self.prompt).to(losses["lm"].dtype)
            losses["lm"] = losses["lm"] * self.config.weight_of_mean(targets)
        return losses, metrics

    def draw(self, similar: Similarities, image_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Of the rows of all processes a wrong image for each text and a wrong text for each image, two of [B] indices:
        the draws `wrong_images` and `wrong_texts`."""
        to_text, to_image = similar
        every = gather(image_ids)
        wrong_images = negative_weights_among_others(to_image, image_ids, every)
        wrong_texts = negative_weights_among_others(to_text, image_ids, every)
        return self.draws.columns("wrong_images", wrong_images), self.draws.columns("wrong_texts", wrong_texts)


class Blip2Stage2(Task):
    """A Q-Former whose queries learn to tell a frozen language model what is in the image."""

    model: Blip2
    config: ObjectivesConfig

    def __init__(self, model: Blip2, config: ObjectivesConfig, prompt: int = 0):
        if reason := vanishing(model.config):
            raise RecipeError(reason)
        super().__init__(model, config, prompt)
        exclude_frozen(self)

    def compute_losses(self, batch: PairBatch, progress: float) -> LossesAndMetrics:
        """LM of the texts, in tokens of the language model."""
        images, ids, mask, _ = batch
        logits, labels = self.model.predict(self.model.encode_image(images), ids, mask, self.prompt)
        loss = answered(logits, labels, self.config.smoothing)
        return {"lm": loss * self.config.weight_of_mean((labels != -100).sum().to(loss.dtype))}, {}

    def backward_in_chunks(
        self, batch: PairBatch, progress: float, chunks: int, precision: Precision
    ) -> LossesAndMetrics:
        """LM alone is a mean over tokens: chunks weigh as many as they have, here or on all processes."""
        self.before_step()
        rows = batch.chunks(chunks)
        counts = torch.stack([batch.mask_BT[part, self.prompt :].sum() for part in rows])
        if self.config.mean_over == "all":
            counts = all_reduce_sum(counts)
        whole = torch.zeros((), device=batch.device)
        for part, count in zip(rows, counts.unbind(), strict=True):
            with precision():
                losses, _ = self.compute_losses(batch.select(part), progress)
                share_of_total = count.to(losses["lm"].dtype) / counts.sum()
                loss = self.total({"lm": losses["lm"] * share_of_total})
            loss.backward()
            whole = whole + losses["lm"].detach() * share_of_total
        return {"lm": whole}, {}


def pretraining(model: Blip2, config: ObjectivesConfig, prompt: int = 0) -> Task:
    """The stage that an architecture is for: the second where it has a language model."""
    return (Blip2Stage1 if model.config.language is None else Blip2Stage2)(model, config, prompt)
