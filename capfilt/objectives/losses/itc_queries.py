"""Image-text contrast of BLIP-2's first stage: the keys are the other pairs of the batch (BLIP-2 section 3.2).

An image is several vectors, one for each query, and as near to a text as its nearest. There is no momentum copy and no
queue; the keys are those of all processes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from capfilt.objectives.collectives import gather, gather_with_gradient, rank
from capfilt.objectives.losses.itc import Itc

SMOOTHING = 0.1
"""Label smoothing (public pretraining code)."""


def itc_queries(
    image_BQP: Tensor,
    text_BP: Tensor,
    temperature: Tensor,
    smoothing: float = SMOOTHING,
    image_ids_B: Tensor | None = None,
) -> Itc:
    """L = (CE(y, s_i2t / t) + CE(y, s_t2i / t)) / 2 with s = max over queries, y the own pair, smoothed.

    Unit vectors of this process's rows; the keys are those of all, with their gradients. The public code gathers them
    without: then a process's gradient is not that of the loss over all rows, not even in direction, when there is
    more than one. The temperature is not clamped.

    With `image_ids_B` (equal numbers = the same image) the target is even over all columns of the pair's image, as in
    the     fine-tuning for retrieval.
    """
    keys_image, keys_text = gather_with_gradient(image_BQP), gather_with_gradient(text_BP)
    B = text_BP.shape[0]
    # A cosine in bf16 is off by up to 0.004, and that is divided by a temperature of 0.07.
    with torch.autocast(image_BQP.device.type, enabled=False):
        to_text_BN = torch.einsum("bqp,np->bqn", image_BQP, keys_text).amax(dim=1) / temperature
        to_image_BN = torch.einsum("nqp,bp->bnq", keys_image, text_BP).amax(dim=2) / temperature
        if image_ids_B is None:
            target = torch.arange(B, device=text_BP.device) + rank() * B
        else:
            same = (image_ids_B[:, None] == gather(image_ids_B)[None, :]).to(to_text_BN.dtype)
            target = same / same.sum(dim=1, keepdim=True)
        both = [F.cross_entropy(logits, target, label_smoothing=smoothing) for logits in (to_text_BN, to_image_BN)]
        return Itc((both[0] + both[1]) / 2, to_text_BN.detach(), to_image_BN.detach())


@torch.no_grad()
def hard_negatives_of_all(similarity_BN: Tensor, image_ids_B: Tensor, groups_N: Tensor) -> Tensor:
    """For each row draw one column that is another image, by softmax over those columns alone; [B] indices.

    The row's image is taken out before the softmax, not after it as in BLIP, so that nothing can underflow. The
    public code takes out the pair itself alone; another text of the same image is no wrong one either.
    """
    same = image_ids_B[:, None] == groups_N[None, :]
    weights = similarity_BN.float().masked_fill(same, -torch.inf).softmax(dim=1).nan_to_num()
    weights[weights.sum(dim=1) == 0] = 1.0  # nothing can be wrong, or nothing is finite: `itm` leaves it out
    return torch.multinomial(weights, 1).squeeze(1)
