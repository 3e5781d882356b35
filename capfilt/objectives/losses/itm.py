"""Image-text matching with hard negatives drawn by ITC similarity (BLIP section 3.2, after ALBEF section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from capfilt.models import Model
from capfilt.models.layers.image_context import ImageContext
from capfilt.models.layers.precision import at_least_fp32
from capfilt.objectives.collectives import as_wide, gather, gather_with_gradient

LEFT_OUT = -100
"""The label of a pair that has no part in the loss."""

STUCK_WITHIN = 0.005
"""How near to the trivial loss a mean must be to count as trivial."""
STUCK_STEPS, STUCK_SHARE = 200, 0.3
"""How long it must stay there for an alarm: so many steps, and this share of the training."""

Similarities = tuple[Tensor, Tensor]
"""Image to text and text to image, [B, N] each: this process's rows against those of all, over the temperature."""


class Negatives(NamedTuple):
    """A wrong image and a wrong text for each of B pairs."""

    image_context: ImageContext
    """Of the wrong images, B rows each."""
    texts: Tensor
    """The wrong texts: ids [B, T], or states [B, T, D]."""
    mask_BT: Tensor
    image_is_wrong_B: Tensor
    """False where the image drawn is of the pair's group after all: there was no other."""
    text_is_wrong_B: Tensor

    @property
    def num_targets(self) -> Tensor:
        """How many pairs `itm` is the mean of."""
        return self.image_is_wrong_B.numel() + self.image_is_wrong_B.sum() + self.text_is_wrong_B.sum()


def local_negatives(
    texts: Tensor,
    mask_BT: Tensor,
    image_context: ImageContext,
    image_ids_B: Tensor,
    wrong_images_B: Tensor,
    wrong_texts_B: Tensor,
) -> Negatives:
    """Negatives among this process's rows, whose image context is there already (BLIP's pretraining).

    `texts` are ids [B, T], or states [B, T, D].
    """
    return Negatives(
        image_context=image_context.select(wrong_images_B),
        texts=texts.index_select(0, wrong_texts_B),
        mask_BT=mask_BT[wrong_texts_B],
        image_is_wrong_B=image_ids_B[wrong_images_B] != image_ids_B,
        text_is_wrong_B=image_ids_B[wrong_texts_B] != image_ids_B,
    )


def global_negatives(
    model: Model,
    tokens_BLD: Tensor,
    ids_BT: Tensor,
    mask_BT: Tensor,
    image_ids_B: Tensor,
    wrong_images_B: Tensor,
    wrong_texts_B: Tensor,
) -> Negatives:
    """Negatives from the N rows of all ranks, image tokens with their gradients (BLIP's fine-tuning on COCO).

    The indices count rows in rank order. Texts come back as wide as the longest of any rank.
    """
    groups_N = gather(image_ids_B)
    return Negatives(
        image_context=model.image_context(gather_with_gradient(tokens_BLD).index_select(0, wrong_images_B), "encoder"),
        texts=gather(as_wide(ids_BT))[wrong_texts_B],
        mask_BT=gather(as_wide(mask_BT))[wrong_texts_B],
        image_is_wrong_B=groups_N[wrong_images_B] != image_ids_B,
        text_is_wrong_B=groups_N[wrong_texts_B] != image_ids_B,
    )


def itm(
    model: Model,
    texts: Tensor,
    mask_BT: Tensor,
    image_context: ImageContext,
    wrong: Negatives,
    fuse: Callable[[Tensor, Tensor, ImageContext], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of B right pairs, B texts beside wrong images and B images beside wrong texts; label 1 = match.

    `texts` are ids [B, T], which the model's `fuse` reads, or what another `fuse` does. Returns the loss and the share
    of the pairs that were classified right. A negative that is not wrong (a batch of one image) leaves its pair out.
    """
    fuse = model.fuse if fuse is None else fuse
    wider = wrong.texts.shape[1] - texts.shape[1]
    own = F.pad(texts, (0, 0) * (texts.ndim - 2) + (0, wider))
    # Rows that share an image are adjacent: each image with its text, then with a wrong one.
    with_own = torch.stack([own, wrong.texts], dim=1).flatten(0, 1)
    with_own_mask = torch.stack([F.pad(mask_BT, (0, wider)), wrong.mask_BT], dim=1).flatten(0, 1)
    paired = model.match(fuse(with_own, with_own_mask, image_context))
    logits = torch.cat([paired, model.match(fuse(texts, mask_BT, wrong.image_context))])
    B = texts.shape[0]
    labels = torch.zeros(3 * B, dtype=torch.long, device=texts.device)
    labels[0 : 2 * B : 2] = 1
    labels[1 : 2 * B : 2].masked_fill_(~wrong.text_is_wrong_B, LEFT_OUT)
    labels[2 * B :].masked_fill_(~wrong.image_is_wrong_B, LEFT_OUT)
    loss = F.cross_entropy(at_least_fp32(logits), labels, ignore_index=LEFT_OUT)
    right = (logits.detach().argmax(dim=1) == labels).sum()
    return loss, right / (labels != LEFT_OUT).sum()


def trivial_loss(match_share: float = 1 / 3) -> float:
    """Entropy of the mix of right and wrong pairs, nats: a loss that stays here has learned nothing (BLIP issues 51,
    152, 200). 0.6365 where a third of the pairs match, 0.6931 where half do."""
    return -sum(share * math.log(share) for share in (match_share, 1 - match_share))


class Alarm:
    """Tells when ITM has stood at the trivial answer for long: `STUCK_STEPS` and `STUCK_SHARE` of `steps`.

    `match_share` is the share of the pairs that match.
    """

    def __init__(self, steps: int, start: int = 0, match_share: float = 1 / 3):
        self.patience = max(STUCK_STEPS, math.ceil(STUCK_SHARE * steps))
        self.level = trivial_loss(match_share)
        self.moved = start
        """The last step at which the loss was seen elsewhere."""

    def stuck(self, step: int, loss: float) -> bool:
        """Take note of the mean loss of the steps up to `step`, and say whether it has not moved for long."""
        if abs(loss - self.level) > STUCK_WITHIN:
            self.moved = step
        return step - self.moved >= self.patience
