"""Captioning: the model's texts beside the human ones, and what one and the same text for every image reaches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from capfilt.evaluation.evaluate import caption
from capfilt.evaluation.metrics import captioning
from capfilt.evaluation.tasks import Measured
from capfilt.evaluation.tasks.config import CaptioningEvalConfig
from capfilt.evaluation.tasks.pairs import read_pairs
from capfilt.inference.captioners.local import LocalCaptioner
from capfilt.inference.local_model import LocalModel


def measure(local: LocalModel, urls: Sequence[str], config: CaptioningEvalConfig, device: torch.device) -> Measured:
    """`evaluate.caption` of the images of shards. DataError where none has a text."""
    pairs, left_out = read_pairs(local, urls, config.batch_size, device)
    figures = caption(LocalCaptioner(local, config.decode), pairs, config.batch_size)
    ((common, _),) = Counter(pairs.flat_texts).most_common(1)
    same = [common] * len(pairs.texts)
    constant = captioning.cider(same, pairs.texts) | captioning.bleu4(same, pairs.texts)
    return Measured({"captioning": {**figures, "images": len(same), "constant": constant}} | left_out.figures())
