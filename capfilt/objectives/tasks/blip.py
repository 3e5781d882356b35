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
from capfilt.models.blip.model import Blip
from capfilt.models.layers.image_context import ImageContext
from capfilt.objectives.collectives import gather, rank, share_of_total, world_size
from capfilt.objectives.losses.itc import TEMPERATURE_RANGE, itc, ramp
from capfilt.objectives.losses.itm import Negatives, global_negatives, hard_negatives, itm, local_negatives
from capfilt.objectives.losses.lm import SMOOTHING, lm, num_targets
from capfilt.objectives.momentum import Momentum

Objective = Literal["itc", "itm", "lm"]

Similarities = tuple[Tensor, Tensor]
"""Image to text and text to image, [B, N] each: this process's rows against those of all, over the temperature."""

LossesAndMetrics = tuple[dict[str, Tensor], dict[str, Tensor]]
"""Losses with gradients and figures without, by name."""

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
    negatives: Literal["rank", "all"] = "rank"
    """Where ITM draws its hard negatives: from a process's own pairs (BLIP's pretraining), or from those of all
    processes (its fine-tuning on COCO)."""
    negatives_by: Literal["momentum", "online"] = "momentum"
    """What tells how hard a negative is: online features against momentum features (BLIP's pretraining), or against
    online features (its retrieval fine-tuning)."""
    momentum_from: Literal["model", "start"] = "model"
    """What the momentum copy and the queues begin with: the model and noise, or what the training that the model
    starts from ended with (BLIP's retrieval fine-tuning); that training must have kept them (`keep_momentum`)."""
    mean_over: Literal["rank", "all"] = "rank"
    """Of what LM and ITM are the mean: of a process's own tokens and pairs, and then over processes (BLIP's code), or
    of those of all processes, which does not depend on how many there are."""
    smoothing: float = Field(default=SMOOTHING, ge=0, lt=1)


class BlipPretraining(nn.Module):
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
        self, images_B3SS: Tensor, ids_BT: Tensor, mask_BT: Tensor, image_ids_B: Tensor, progress: float
    ) -> LossesAndMetrics:
        """Ask every objective about B pairs, images [B, 3, S, S] and texts [B, T].

        `image_ids_B` numbers the images of the batch (equal numbers = the same image); `progress` is the share of
        training that is done.
        """
        self.begin()
        return self.compute_losses(images_B3SS, ids_BT, mask_BT, image_ids_B, progress)

    def compute_losses(
        self, images_B3SS: Tensor, ids_BT: Tensor, mask_BT: Tensor, image_ids_B: Tensor, progress: float
    ) -> LossesAndMetrics:
        """`forward` after `begin`."""
        losses: dict[str, Tensor] = {}
        figures: dict[str, Tensor] = {}
        tokens = self.model.encode_image(images_B3SS)
        similar = None
        if self.momentum is not None:
            slow = self.momentum.features(images_B3SS, ids_BT, mask_BT)
            image = self.model.project_image(tokens)
            text = self.model.project_text(self.model.encode_text(ids_BT, mask_BT))
            losses["itc"], similar = self.compare(image, text, slow, image_ids_B, progress)
        keys = None
        if "itm" in self.config.losses:
            keys = self.model.image_context(tokens, "encoder")
            wrong = self._partners(self.draw(similar, image_ids_B), tokens, keys, ids_BT, mask_BT, image_ids_B)
            losses["itm"], figures["itm_accuracy"] = itm(self.model, ids_BT, mask_BT, keys, wrong)
            losses["itm"] = losses["itm"] * share_of(wrong.num_targets, self.config)
        if "lm" in self.config.losses:
            if keys is None or not self.model.shares_image_context:
                keys = self.model.image_context(tokens, "decoder")
            logits = self.model.decode(ids_BT, mask_BT, keys)
            losses["lm"] = lm(logits, ids_BT, mask_BT, self.prompt, smoothing=self.config.smoothing)
            losses["lm"] = losses["lm"] * share_of(num_targets(ids_BT, mask_BT, self.prompt), self.config)
        return losses, figures

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum that is minimised."""
        return total(losses, self.config)

    def begin(self) -> None:
        """What a step begins with, while no weight is in use: the temperature kept in its range, the momentum copy
        moved towards the model."""
        if self.momentum is None:
            return
        with torch.no_grad():
            self.model.temperature.clamp_(*TEMPERATURE_RANGE)
        if self.training:
            self.momentum.update(self.model)

    def compare(
        self, image: Tensor, text: Tensor, slow: tuple[Tensor, Tensor], image_ids: Tensor, progress: float
    ) -> tuple[Tensor, Similarities]:
        """ITC of online and momentum features [B, P], and what ITM draws by; then the momentum features are queued."""
        assert self.momentum is not None
        queued = self.momentum.queue_groups
        pairs = itc(
            image,
            text,
            *slow,
            self.momentum.queue_image.clone(),
            self.momentum.queue_text.clone(),
            self.model.temperature,
            ramp(progress, self.config.alpha, self.config.alpha_ramp),
            None if queued is None else (image_ids, queued.clone()),
        )
        if self.training:
            self.momentum.enqueue(*slow, image_ids)
        if self.config.negatives_by == "online":
            with torch.no_grad():
                temperature = self.model.temperature
                return pairs.loss, (image @ gather(text).T / temperature, text @ gather(image).T / temperature)
        return pairs.loss, (pairs.image_to_text_BN, pairs.text_to_image_BN)

    def draw(self, similar: Similarities | None, image_ids: Tensor) -> tuple[Tensor, Tensor]:
        """A wrong image for each text and a wrong text for each image, two of [B] indices."""
        B = image_ids.shape[0]
        if similar is None:  # without ITC there are no similarities: any other image is as good
            even = image_ids.new_zeros(B, B * world_size(), dtype=torch.float32)
            similar = even, even
        to_text, to_image = similar
        if self.config.negatives == "all":
            every = gather(image_ids)
            return hard_negatives(to_image, image_ids, every), hard_negatives(to_text, image_ids, every)
        own = slice(rank() * B, rank() * B + B)
        return hard_negatives(to_image[:, own], image_ids, image_ids), hard_negatives(
            to_text[:, own], image_ids, image_ids
        )

    def _partners(
        self,
        drawn: tuple[Tensor, Tensor],
        tokens: Tensor,
        keys: ImageContext,
        ids: Tensor,
        mask: Tensor,
        image_ids: Tensor,
    ) -> Negatives:
        if self.config.negatives == "all":
            return global_negatives(self.model, tokens, ids, mask, image_ids, *drawn)
        return local_negatives(ids, mask, keys, image_ids, *drawn)


def total(losses: dict[str, Tensor], config: ObjectivesConfig) -> Tensor:
    """The weighted sum of those losses that are there."""
    weighted = [losses[name] * weight for name, weight in config.losses.items() if name in losses]
    return torch.stack(weighted).sum()


def share_of(count: Tensor, config: ObjectivesConfig) -> Tensor | float:
    """What a mean over `count` things of this process weighs; 1 where processes count alike, however much they have."""
    return share_of_total(count) if config.mean_over == "all" else 1.0
