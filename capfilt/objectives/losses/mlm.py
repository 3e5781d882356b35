"""MLM: hidden tokens are guessed from the text around them and the image (BERT; ALBEF section 3.2, ViLT section 3.2).

ALBEF also distils: the momentum copy's guesses are soft targets beside the tokens (its section 3.3, equation 7).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from capfilt.models.layers.precision import at_least_fp32
from capfilt.objectives.masking import IGNORED


def mlm(logits_BTV: Tensor, labels_BT: Tensor, momentum_BTV: Tensor | None = None, alpha: float = 0.0) -> Tensor:
    """Mean over hidden tokens of (1 - alpha) CE(label) + alpha CE(softmax of the momentum copy's logits).

    Logits [B, T, V]; labels are -100 where nothing is guessed. 0 where nothing is at all.
    """
    logits, labels = at_least_fp32(logits_BTV).flatten(0, 1), labels_BT.flatten()
    hidden = labels != IGNORED
    count = hidden.sum().clamp(min=1)
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / count
    if momentum_BTV is None:
        return loss
    soft = at_least_fp32(momentum_BTV).flatten(0, 1).softmax(dim=1)
    distilled = -(soft * logits.log_softmax(dim=1)).sum(dim=1)
    # A sum over all rows, of which most are zero, where indexing would wait for a GPU to say how many there are.
    distilled = distilled.masked_fill(~hidden, 0.0).sum() / count
    return (1 - alpha) * loss + alpha * distilled


def num_hidden(labels_BT: Tensor) -> Tensor:
    """How many tokens a mean of `mlm` is taken over."""
    return (labels_BT != IGNORED).sum()
