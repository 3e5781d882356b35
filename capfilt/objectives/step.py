"""One training step's forward pass: any of ITC, ITM and LM, asked together so that the image is looked at once.

BLIP's cost per step is one pass of the vision tower, one of its momentum copy, and the text stack over 1 (ITC) + 1
(momentum) + 3 (ITM) + 1 (LM) texts per pair; images are projected for cross-attention once for all of them when the
roles share it.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from capfilt.config import Config
from capfilt.models.blip import Blip
from capfilt.objectives.itc import TEMPERATURE_RANGE, Itc, itc, ramp
from capfilt.objectives.itm import hard_negatives, itm
from capfilt.objectives.lm import SMOOTHING, lm
from capfilt.objectives.momentum import Momentum

Objective = Literal["itc", "itm", "lm"]

NEEDS: dict[Objective, frozenset[str]] = {
    "itc": frozenset({"encode_image", "encode_text"}),
    "itm": frozenset({"encode_image", "fuse"}),
    "lm": frozenset({"encode_image", "decode"}),
}
"""The verbs that each objective asks of a model."""


class ObjectivesConfig(Config):
    """Which losses are summed, and their constants; the defaults are the paper's."""

    losses: dict[Objective, float] = Field(default={"itc": 1.0, "itm": 1.0, "lm": 1.0}, min_length=1)
    """Weight of each; BLIP sums them unweighted."""
    momentum: float = Field(default=0.995, ge=0, le=1)
    queue: int = Field(default=57600, ge=0)
    """Features kept from earlier steps as negatives; a multiple of the global batch."""
    alpha: float = Field(default=0.4, ge=0, le=1)
    """Final weight of the soft targets."""
    alpha_ramp: float = Field(default=0.1, ge=0, le=1)
    """Share of training over which alpha grows from 0; BLIP: 2 of 20 epochs."""
    itc_targets: Literal["pair", "image"] = "pair"
    """What ITC asks for: the pair alone (BLIP's pretraining), or whatever is of the same image, in the queue too (its
    retrieval fine-tuning)."""
    smoothing: float = Field(default=SMOOTHING, ge=0, lt=1)


class Learner(nn.Module):
    """A model with what its objectives must remember (momentum copy, queues); what data-parallel training wraps.

    `forward` takes a batch and returns {name: loss} with gradients, and {name: figure} without. `prompt` is how many
    tokens each text begins with that LM does not ask for, counting [DEC].
    """

    def __init__(self, model: Blip, config: ObjectivesConfig, prompt: int = 0):
        super().__init__()
        self.model = model
        self.config = config
        self.prompt = prompt
        by_image = config.itc_targets == "image"
        has_itc = "itc" in config.losses
        self.momentum = Momentum(model, config.momentum, config.queue, by_image) if has_itc else None

    def forward(
        self, images_B3SS: Tensor, ids_BT: Tensor, mask_BT: Tensor, groups_B: Tensor, progress: float
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Ask every objective about B pairs, images [B, 3, S, S] and texts [B, T].

        `groups_B` numbers the images of the batch (equal numbers = the same image); `progress` is the share of
        training that is done.
        """
        losses: dict[str, Tensor] = {}
        figures: dict[str, Tensor] = {}
        tokens = self.model.encode_image(images_B3SS)
        pairs = None
        if self.momentum is not None:
            pairs = self._itc(images_B3SS, tokens, ids_BT, mask_BT, groups_B, progress)
            losses["itc"] = pairs.loss
        keys = None
        if "itm" in self.config.losses:
            keys = self.model.image_keys(tokens, "encoder")
            wrong_images, wrong_texts = self._negatives(pairs, tokens, ids_BT, mask_BT, groups_B)
            losses["itm"], figures["itm_accuracy"] = itm(
                self.model, ids_BT, mask_BT, keys, groups_B, wrong_images, wrong_texts
            )
        if "lm" in self.config.losses:
            if keys is None or not self.model.shares_image_keys:
                keys = self.model.image_keys(tokens, "decoder")
            logits = self.model.decode(ids_BT, mask_BT, keys)
            losses["lm"] = lm(logits, ids_BT, mask_BT, self.prompt, smoothing=self.config.smoothing)
        return losses, figures

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum that is minimised."""
        return torch.stack([losses[name] * weight for name, weight in self.config.losses.items()]).sum()

    def _itc(self, images: Tensor, tokens: Tensor, ids: Tensor, mask: Tensor, groups: Tensor, progress: float) -> Itc:
        assert self.momentum is not None
        with torch.no_grad():
            self.model.temperature.clamp_(*TEMPERATURE_RANGE)
        if self.training:
            self.momentum.update(self.model)
        momentum_image, momentum_text = self.momentum.features(images, ids, mask)
        queued = self.momentum.queue_groups
        pairs = itc(
            self.model.project_image(tokens),
            self.model.project_text(self.model.encode_text(ids, mask)),
            momentum_image,
            momentum_text,
            self.momentum.queue_image.clone(),
            self.momentum.queue_text.clone(),
            self.model.temperature,
            ramp(progress, self.config.alpha, self.config.alpha_ramp),
            None if queued is None else (groups, queued.clone()),
        )
        if self.training:
            self.momentum.enqueue(momentum_image, momentum_text, groups)
        return pairs

    def _negatives(
        self, pairs: Itc | None, tokens: Tensor, ids: Tensor, mask: Tensor, groups: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A wrong image for each text and a wrong text for each image, [B] indices each."""
        if pairs is None:  # without ITC there are no similarities: any other image is as good
            even = tokens.new_zeros(ids.shape[0], ids.shape[0])
            return hard_negatives(even, groups), hard_negatives(even, groups)
        return hard_negatives(pairs.text_to_image_BB, groups), hard_negatives(pairs.image_to_text_BB, groups)
