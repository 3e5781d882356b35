"""Image-text matching with hard negatives drawn by ITC similarity (BLIP section 3.2, after ALBEF section 3.2)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from capfilt.models.blip import Blip
from capfilt.models.layers import KeysValues

TRIVIAL_LOSS = 0.6365
"""Entropy of the 1 : 2 mix of right and wrong pairs: a loss that stays here has learned nothing (BLIP issues 51, 152,
200)."""

LEFT_OUT = -100
"""The label of a pair that is not asked about."""

STUCK_WITHIN = 0.005
"""How near to the trivial loss a mean must be to count as trivial."""
STUCK_STEPS, STUCK_SHARE = 200, 0.3
"""How long it must stay there for an alarm: so many steps, and this share of the training."""


@torch.no_grad()
def hard_negatives(similarity_BB: Tensor, groups_B: Tensor) -> Tensor:
    """For each row draw one column that is another image, by softmax of its similarity; [B] indices.

    1e-4 is added after the softmax, as in the public BLIP: without it a confident row can underflow to all zeros.
    Rows and columns of the same group (the same image, written about twice) are no negatives of each other. Where all
    columns are of the row's own group, nothing can be wrong, and the column drawn is one that `itm` leaves out.
    Similarities that are not finite are no crash here: the loss, not finite either, is what tells of them.
    """
    weights = F.softmax(similarity_BB.float(), dim=1).nan_to_num() + 1e-4
    same = groups_B[:, None] == groups_B[None, :]
    weights = weights.masked_fill(same, 0.0)
    weights[weights.sum(dim=1) == 0] = 1.0  # multinomial wants something to draw
    return torch.multinomial(weights, 1).squeeze(1)


def itm(
    model: Blip,
    ids_BT: Tensor,
    mask_BT: Tensor,
    image_keys: list[KeysValues],
    groups_B: Tensor,
    wrong_images_B: Tensor,
    wrong_texts_B: Tensor,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of B right pairs, B texts beside wrong images and B images beside wrong texts; label 1 = match.

    Returns the loss and the share of the pairs that were judged right. The image keys of the B images serve all
    three. A "wrong" partner of the same group is not wrong (a batch of one image): that pair is left out.
    """
    # Rows that share an image are adjacent: each image with its own text, then with a wrong one.
    with_own = torch.stack([ids_BT, ids_BT[wrong_texts_B]], dim=1).flatten(0, 1)
    with_own_mask = torch.stack([mask_BT, mask_BT[wrong_texts_B]], dim=1).flatten(0, 1)
    paired = model.match(model.fuse(with_own, with_own_mask, image_keys))
    beside_wrong = [(k[wrong_images_B], v[wrong_images_B]) for k, v in image_keys]
    logits = torch.cat([paired, model.match(model.fuse(ids_BT, mask_BT, beside_wrong))])
    B = ids_BT.shape[0]
    labels = torch.zeros(3 * B, dtype=torch.long, device=ids_BT.device)
    labels[0 : 2 * B : 2] = 1
    labels[1 : 2 * B : 2].masked_fill_(groups_B[wrong_texts_B] == groups_B, LEFT_OUT)
    labels[2 * B :].masked_fill_(groups_B[wrong_images_B] == groups_B, LEFT_OUT)
    loss = F.cross_entropy(logits.float(), labels, ignore_index=LEFT_OUT)
    right = (logits.detach().argmax(dim=1) == labels).sum()
    return loss, right / (labels != LEFT_OUT).sum()


class Alarm:
    """Tells when ITM has stood at the trivial answer for long: `STUCK_STEPS` and `STUCK_SHARE` of `steps`."""

    def __init__(self, steps: int, start: int = 0):
        self.patience = max(STUCK_STEPS, math.ceil(STUCK_SHARE * steps))
        self.moved = start
        """The last step at which the loss was seen elsewhere."""

    def stuck(self, step: int, loss: float) -> bool:
        """Take note of the mean loss of the steps up to `step`, and say whether it has not moved for long."""
        if abs(loss - TRIVIAL_LOSS) > STUCK_WITHIN:
            self.moved = step
        return step - self.moved >= self.patience
