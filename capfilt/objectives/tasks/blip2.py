"""BLIP-2's two stages as training steps (BLIP-2 sections 3.2 and 3.3), with the interface of `BlipPretraining`.

Stage 1 asks ITC, ITM and LM of the Q-Former itself: one pass of the frozen tower and of the queries for all three, for
the writer goes on from what the queries saw when they were compared. Stage 2 asks the frozen language model for the
text.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from capfilt.models import Architecture, Model
from capfilt.models.blip.model import Blip
from capfilt.models.blip2.model import Blip2
from capfilt.objectives.collectives import gather, world_size
from capfilt.objectives.losses.itc_queries import hard_negatives_of_all, itc_queries
from capfilt.objectives.losses.itm import global_negatives, itm
from capfilt.objectives.losses.lm import answered, lm, num_targets
from capfilt.objectives.tasks.blip import (
    BlipPretraining,
    LossesAndMetrics,
    ObjectivesConfig,
    Similarities,
    share_of,
    total,
)

OF_MOMENTUM = ("momentum", "alpha", "alpha_ramp", "negatives", "negatives_by", "momentum_from")
"""What ObjectivesConfig says of BLIP's ITC and ITM and BLIP-2's have no use for."""


def exclude_frozen(learner: nn.Module) -> None:
    """Keep frozen weights out of a learner's `state_dict`: a resumed training begins with the same ones, read again."""
    learner.register_state_dict_post_hook(_without_frozen)
    learner.register_load_state_dict_post_hook(_nothing_missing)


def _frozen(learner: nn.Module) -> set[str]:
    return {name for name, p in learner.named_parameters(remove_duplicate=False) if not p.requires_grad}


def _without_frozen(learner: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    for name in _frozen(learner):
        state.pop(prefix + name, None)


def _nothing_missing(learner: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = sorted(set(keys.missing_keys) - _frozen(learner))


class Blip2Stage1(nn.Module):
    """A Q-Former that learns to compare, to match and to write; the same in and out as `BlipPretraining`."""

    momentum: None = None

    def __init__(self, model: Blip2, config: ObjectivesConfig, prompt: int = 0):
        super().__init__()
        self.model = model
        self.config = config
        self.prompt = prompt
        exclude_frozen(self)

    def forward(
        self, images_B3SS: Tensor, ids_BT: Tensor, mask_BT: Tensor, image_ids_B: Tensor, progress: float
    ) -> LossesAndMetrics:
        """Ask every objective about B pairs; see `Learner.forward`."""
        losses: dict[str, Tensor] = {}
        figures: dict[str, Tensor] = {}
        tokens = self.model.encode_image(images_B3SS)
        keys = self.model.image_context(tokens, "encoder")
        states, seen = self.model.text.run_queries(keys)
        B = ids_BT.shape[0]
        even = tokens.new_zeros(B, B * world_size())
        similar: Similarities = even, even  # without ITC any other image is as good
        if "itc" in self.config.losses:
            image = self.model.project_queries(states)
            text = self.model.project_text(self.model.encode_text(ids_BT, mask_BT))
            image_ids = image_ids_B if self.config.itc_targets == "image" else None
            pairs = itc_queries(image, text, self.model.temperature, self.config.smoothing, image_ids)
            losses["itc"], similar = pairs.loss, (pairs.image_to_text_BN, pairs.text_to_image_BN)
        if "itm" in self.config.losses:
            to_text, to_image = similar
            every = gather(image_ids_B)
            drawn = (
                hard_negatives_of_all(to_image, image_ids_B, every),
                hard_negatives_of_all(to_text, image_ids_B, every),
            )
            wrong = global_negatives(self.model, tokens, ids_BT, mask_BT, image_ids_B, *drawn)
            losses["itm"], figures["itm_accuracy"] = itm(self.model, ids_BT, mask_BT, keys, wrong)
            losses["itm"] = losses["itm"] * share_of(wrong.num_targets, self.config)
        if "lm" in self.config.losses:
            logits = self.model.decode(ids_BT, mask_BT, seen)
            losses["lm"] = lm(logits, ids_BT, mask_BT, self.prompt, smoothing=self.config.smoothing)
            losses["lm"] = losses["lm"] * share_of(num_targets(ids_BT, mask_BT, self.prompt), self.config)
        return losses, figures

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum that is minimised."""
        return total(losses, self.config)


class Blip2Stage2(nn.Module):
    """Queries that learn to tell a frozen language model what is in the image; interface of `BlipPretraining`."""

    momentum: None = None

    def __init__(self, model: Blip2, config: ObjectivesConfig, prompt: int = 0):
        super().__init__()
        self.model = model
        self.config = config
        self.prompt = prompt
        exclude_frozen(self)

    def forward(
        self, images_B3SS: Tensor, ids_BT: Tensor, mask_BT: Tensor, image_ids_B: Tensor, progress: float
    ) -> LossesAndMetrics:
        """Ask for the texts [B, T], in tokens of the language model."""
        logits, labels = self.model.predict(self.model.encode_image(images_B3SS), ids_BT, mask_BT, self.prompt)
        loss = answered(logits, labels, self.config.smoothing)
        return {"lm": loss * share_of((labels != -100).sum(), self.config)}, {}

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum that is minimised."""
        return total(losses, self.config)


Pretraining = BlipPretraining | Blip2Stage1 | Blip2Stage2


def pretraining_of(model: Model, config: ObjectivesConfig, prompt: int = 0) -> Pretraining:
    """What trains a model of this family and stage."""
    if isinstance(model, Blip):
        return BlipPretraining(model, config, prompt)
    assert isinstance(model, Blip2)
    return (Blip2Stage1 if model.config.language is None else Blip2Stage2)(model, config, prompt)


def without_use(architecture: Architecture, config: ObjectivesConfig) -> str:
    """What of the objectives a model of this family would pass over in silence, as a sentence; "" for nothing."""
    if architecture.family == "blip":
        return ""
    if config.queue:
        return f"objectives.queue is {config.queue}, and BLIP-2 has no queue: set it to 0."
    default = ObjectivesConfig()
    given = [name for name in OF_MOMENTUM if getattr(config, name) != getattr(default, name)]
    if given:
        return f"objectives.{given[0]} is of BLIP's momentum copy, which BLIP-2 does not have: leave it out."
    return ""
