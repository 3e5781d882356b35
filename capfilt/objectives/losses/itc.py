"""Image-text contrastive loss with momentum keys and soft targets (BLIP section 3.2, after ALBEF section 3.2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from capfilt.objectives.collectives import gather, rank, world_size

TEMPERATURE_RANGE = (0.001, 0.5)
"""The learned temperature is clamped in place to this at every step (public pretraining code)."""


class Itc(NamedTuple):
    """The loss and what it was taken of, without gradients. N rows are those whose keys of this step there are."""

    loss: Tensor
    image_to_text_BN: Tensor
    """Similarities to this step's keys, over the temperature: hard negatives are drawn by them."""
    text_to_image_BN: Tensor
    image_to_text_target_BK: Tensor
    """What was asked for, over all K keys, the queue's too; rows sum to 1."""
    text_to_image_target_BK: Tensor


def itc(
    image_BP: Tensor,
    text_BP: Tensor,
    momentum_image_BP: Tensor,
    momentum_text_BP: Tensor,
    queue_image_QP: Tensor,
    queue_text_QP: Tensor,
    temperature: Tensor,
    alpha: float,
    image_ids: tuple[Tensor, Tensor] | None = None,
) -> Itc:
    """L = (CE(y_i2t, s_i2t / t) + CE(y_t2i, s_t2i / t)) / 2 with y = alpha softmax(s_m / t) + (1 - alpha) onehot.

    Queries [B, P] are online features, keys are momentum features of all ranks and then the queue [Q, P]; all unit
    vectors. The keys carry no gradient, so the mean over ranks that data-parallel training takes is the gradient of
    the global loss. BLIP section 3.2, ALBEF equations 1 and 6; the target is the pair's column, not its image.

    The released codes of BLIP and ALBEF have a rank's own momentum features and then the queue for keys, so that their
    loss depends on how many ranks a batch is spread over: call this inside `collectives.alone()`.

    With `image_ids`, of the batch [B] and of the queue [Q] (equal numbers = the same image), it is the image: the
    onehot becomes even over all columns of the pair's group, as in BLIP's retrieval fine-tuning.
    """
    B, P = image_BP.shape
    # One exchange for both: a small one takes as long as the ranks wait for each other.
    keys_2NP = gather(torch.stack([momentum_text_BP, momentum_image_BP])).view(-1, 2, B, P).transpose(0, 1)
    keys_text = torch.cat([keys_2NP[0].reshape(-1, P), queue_text_QP])
    keys_image = torch.cat([keys_2NP[1].reshape(-1, P), queue_image_QP])
    local = slice(rank() * B, rank() * B + B)
    # A cosine in bf16 is off by up to 0.004, and that is divided by a temperature of 0.07.
    with torch.autocast(image_BP.device.type, enabled=False):
        with torch.no_grad():
            if image_ids is None:
                onehot = image_BP.new_zeros(B, keys_text.shape[0])
                onehot[:, local].fill_diagonal_(1.0)
            else:
                same = image_ids[0][:, None] == torch.cat([gather(image_ids[0]), image_ids[1]])[None, :]
                onehot = same / same.sum(dim=1, keepdim=True).to(image_BP.dtype)
            soft_i2t = F.softmax(momentum_image_BP @ keys_text.T / temperature, dim=1)
            soft_t2i = F.softmax(momentum_text_BP @ keys_image.T / temperature, dim=1)
            target_i2t = alpha * soft_i2t + (1 - alpha) * onehot
            target_t2i = alpha * soft_t2i + (1 - alpha) * onehot
        logits_i2t = image_BP @ keys_text.T / temperature
        logits_t2i = text_BP @ keys_image.T / temperature
        loss = (F.cross_entropy(logits_i2t, target_i2t) + F.cross_entropy(logits_t2i, target_t2i)) / 2
    N = B * world_size()
    return Itc(loss, logits_i2t[:, :N].detach(), logits_t2i[:, :N].detach(), target_i2t, target_t2i)


def ramp(progress: float, alpha: float, length: float) -> float:
    """The weight of the soft targets: linear from 0 to `alpha` over the first `length` of training, then flat.

    `progress` and `length` are shares of training. BLIP: alpha 0.4, over 2 of 20 epochs.
    """
    return alpha * min(1.0, progress / length) if length > 0 else alpha
