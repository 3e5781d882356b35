"""Image-text contrast of BLIP-2's first stage: the keys are the other pairs of the batch (BLIP-2 section 3.2).

An image is several vectors, one for each query, and as near to a text as its nearest. There is no momentum copy and no
queue; the keys are those of all processes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from capfilt.objectives.collectives import distributed, gather, gather_with_gradient, rank
from capfilt.objectives.losses.itc import Itc

SMOOTHING = 0.1
"""Label smoothing (public pretraining code)."""


def itc_queries(
    image_BQP: Tensor,
    text_BP: Tensor,
    temperature: Tensor,
    smoothing: float = SMOOTHING,
    image_ids_B: Tensor | None = None,
    detached: bool = False,
) -> Itc:
    """L = (CE(y, s_i2t / t) + CE(y, s_t2i / t)) / 2 with s = max over queries, y the own pair, smoothed.

    Unit vectors of this process's rows; the keys are those of all, with their gradients. The temperature is not
    clamped.

    `detached`: without their gradients, a process's own rows too, as LAVIS gathers them. Then a process's gradient is
    not that of the loss over all rows, not even in direction. As there, a process that trains without
    torch.distributed gathers nothing, and its keys have gradients all the same.

    With `image_ids_B` (equal numbers = the same image) the target is even over all columns of the pair's image, as in
    the fine-tuning for retrieval.
    """
    gathered = gather if detached and distributed() else gather_with_gradient
    keys_image, keys_text = gathered(image_BQP), gathered(text_BP)
    B = text_BP.shape[0]
    # A cosine in bf16 is off by up to 0.004, and that is divided by a temperature of 0.07.
    with torch.autocast(image_BQP.device.type, enabled=False):
        to_text_BN = torch.einsum("bqp,np->bqn", image_BQP, keys_text).amax(dim=1) / temperature
        to_image_BN = torch.einsum("nqp,bp->bnq", keys_image, text_BP).amax(dim=2) / temperature
        N = to_text_BN.shape[1]
        own_B = torch.arange(B, device=text_BP.device) + rank() * B
        onehot = F.one_hot(own_B, N).to(to_text_BN.dtype)
        target = own_B
        if image_ids_B is not None:
            same = (image_ids_B[:, None] == gather(image_ids_B)[None, :]).to(to_text_BN.dtype)
            onehot = target = same / same.sum(dim=1, keepdim=True)
        both = [F.cross_entropy(logits, target, label_smoothing=smoothing) for logits in (to_text_BN, to_image_BN)]
        wanted = onehot * (1 - smoothing) + smoothing / N
        return Itc((both[0] + both[1]) / 2, to_text_BN.detach(), to_image_BN.detach(), wanted, wanted)
