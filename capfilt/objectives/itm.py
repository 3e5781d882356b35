"""Image-text matching with hard negatives drawn by ITC similarity (BLIP section 3.2, after ALBEF section 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from capfilt.models.blip import Blip
from capfilt.models.layers import KeysValues

TRIVIAL_LOSS = 0.6365
"""Entropy of the 1 : 2 mix of right and wrong pairs: a loss that stays here has learned nothing (BLIP issues 152, 200, 51)."""


@torch.no_grad()
def hard_negatives(similarity_BB: Tensor, groups_B: Tensor) -> Tensor:
    """For each row draw one column that is another image, by softmax of its similarity; [B] indices.

    1e-4 is added after the softmax, as in the public BLIP: without it a confident row can underflow to all zeros.
    Rows and columns of the same group (the same image, written about twice) are no negatives of each other.
    """
    weights = F.softmax(similarity_BB.float(), dim=1) + 1e-4
    same = groups_B[:, None] == groups_B[None, :]
    weights = weights.masked_fill(same, 0.0)
    alone = weights.sum(dim=1) == 0  # a batch of one image: nothing is wrong here, so any other row must do
    weights[alone] = 1.0
    return torch.multinomial(weights, 1).squeeze(1)


def itm(
    model: Blip,
    ids_BT: Tensor,
    mask_BT: Tensor,
    image_keys: list[KeysValues],
    wrong_images_B: Tensor,
    wrong_texts_B: Tensor,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of B right pairs, B texts beside wrong images and B images beside wrong texts.

    Returns the loss and the share of the 3B pairs that were judged right. The image keys of the B images serve all three.
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
    loss = F.cross_entropy(logits.float(), labels)
    return loss, (logits.detach().argmax(dim=1) == labels).float().mean()
