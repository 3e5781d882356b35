"""Language modelling: the decoder writes the text of an image (BLIP section 3.2)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from capfilt.models.layers.precision import at_least_fp32
from capfilt.objectives.config import SMOOTHING


def lm(logits_BTV: Tensor, ids_BT: Tensor, mask_BT: Tensor, prompt: int = 0, smoothing: float = SMOOTHING) -> Tensor:
    """Next-token cross-entropy, the mean over all predicted tokens of the batch.

    Logits [B, T, V] at position t predict token t + 1 of ids [B, T]; padding is not predicted, the closing [SEP] is.
    `prompt` is how many of the first tokens carry no label, counting [DEC], which never has one: captioning
    fine-tuning begins each text with "a picture of " and passes 4, so that the first word to be predicted is the one
    after "of". Pretraining has no prompt (0 and 1 both leave nothing out). BLIP section 3.2.
    """
    labels = _labels(ids_BT, mask_BT, prompt)
    logits = at_least_fp32(logits_BTV[:, :-1].flatten(0, 1))
    return F.cross_entropy(logits, labels.flatten(), ignore_index=-100, label_smoothing=smoothing)


def num_targets(ids_BT: Tensor, mask_BT: Tensor, prompt: int = 0) -> Tensor:
    """How many tokens `lm` is the mean of."""
    return (_labels(ids_BT, mask_BT, prompt) != -100).sum()


def _labels(ids_BT: Tensor, mask_BT: Tensor, prompt: int) -> Tensor:
    labels = ids_BT[:, 1:].masked_fill(mask_BT[:, 1:] == 0, -100)
    if prompt > 1:
        labels[:, : prompt - 1] = -100
    return labels


def answered(logits_BTV: Tensor, labels_BT: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of the tokens that a language model should tell, the mean over all of them in the batch.

    Logits [B, T, V] at position t are for the label t itself; -100 has no part in the loss. BLIP-2 section 3.3; the
    public code does not smooth.
    """
    logits = at_least_fp32(logits_BTV.flatten(0, 1))
    return F.cross_entropy(logits, labels_BT.flatten(), ignore_index=-100, label_smoothing=smoothing)
