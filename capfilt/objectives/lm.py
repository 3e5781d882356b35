"""Language modelling: the decoder writes the text of an image (BLIP section 3.2)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

SMOOTHING = 0.1
"""Label smoothing (BLIP section 3.2)."""


def lm(logits_BTV: Tensor, ids_BT: Tensor, mask_BT: Tensor, prompt: int = 0, smoothing: float = SMOOTHING) -> Tensor:
    """Next-token cross-entropy, the mean over all predicted tokens of the batch.

    Position t predicts token t + 1; padding is not predicted, the closing [SEP] is. With a prompt of `prompt` tokens the
    first `prompt` predictions are left out too (captioning fine-tuning; "a picture of " makes 4 with [DEC]: it counts [DEC]
    itself, whose place holds no label, and three words).
    """
    labels = ids_BT[:, 1:].masked_fill(mask_BT[:, 1:] == 0, -100)
    if prompt > 1:
        labels[:, : prompt - 1] = -100
    logits = logits_BTV[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(logits, labels.flatten(), ignore_index=-100, label_smoothing=smoothing)
