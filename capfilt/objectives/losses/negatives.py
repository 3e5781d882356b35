"""How likely each pair's wrong partners are to be drawn: by their similarity, as hard negatives (ALBEF section 3.2).

Weights are what `torch.multinomial` takes, [B, N] and not normalised, and equal the public codes' `weights_i2t` and
`weights_t2i`. They differ in when the right ones are taken out, and in what is added: BLIP takes them out of the
softmax's result, BLIP-2 before it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from capfilt.models.layers.precision import at_least_fp32
from capfilt.objectives.config import EPSILON


@torch.no_grad()
def negative_weights(similarity_BN: Tensor, image_ids_B: Tensor, groups_N: Tensor, epsilon: float = EPSILON) -> Tensor:
    """For each row a weight of every column that is another image: the softmax of its similarity, plus `epsilon`.

    As in BLIP: `epsilon` is 1e-4 in its pretraining and 0 in its fine-tuning for retrieval, 0 in ALBEF, 1e-5 in X-VLM.
    Rows and columns of the same group (the same image, written about twice) are no negatives of each other; BLIP's
    pretraining takes out the pair alone. Similarities that are not finite are no crash here: the loss, not finite
    either, is what tells of them.
    """
    same_BN = image_ids_B[:, None] == groups_N[None, :]
    weights = at_least_fp32(similarity_BN).softmax(dim=1).nan_to_num() + epsilon
    return _something(weights.masked_fill(same_BN, 0.0), same_BN)


@torch.no_grad()
def negative_weights_among_others(similarity_BN: Tensor, image_ids_B: Tensor, groups_N: Tensor) -> Tensor:
    """As `negative_weights`, by a softmax over the other images alone, as in BLIP-2: nothing can underflow.

    The public code takes out the pair itself alone; another text of the same image is no wrong one either.
    """
    same_BN = image_ids_B[:, None] == groups_N[None, :]
    weights = at_least_fp32(similarity_BN).masked_fill(same_BN, -torch.inf).softmax(dim=1).nan_to_num()
    return _something(weights, same_BN)


def _something(weights_BN: Tensor, same_BN: Tensor) -> Tensor:
    """In rows without any weight even ones: of the other images, or where there are none of all, which `itm` leaves
    out. multinomial wants something to draw."""
    for instead in ((~same_BN).to(weights_BN.dtype), torch.ones_like(weights_BN)):
        weights_BN = torch.where(weights_BN.sum(dim=1, keepdim=True) == 0, instead, weights_BN)
    return weights_BN
