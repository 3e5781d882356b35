"""Visual entailment: what a picture says of a hypothesis, beside the most frequent of the three classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from capfilt.data.tasks import ENTAILMENT_LABELS, Hypothesis, hypotheses_of
from capfilt.evaluation.metrics import classification
from capfilt.evaluation.tasks import Measured
from capfilt.evaluation.tasks.config import EntailmentEvalConfig
from capfilt.evaluation.tasks.rows import RowReader
from capfilt.inference.answers import classify
from capfilt.inference.local_model import LocalModel


def measure(local: LocalModel, urls: Sequence[str], config: EntailmentEvalConfig, device: torch.device) -> Measured:
    """Accuracy over the hypotheses of shards, and by class. DataError where there is none."""
    reader = RowReader(local, lambda sample, failed: hypotheses_of(sample.meta, failed), config.batch_size, device)
    hypotheses: list[Hypothesis] = []
    scores = []
    for batch in reader.batches(urls):
        texts = [one.text for one in batch.flat]
        scores.append(classify(local, batch.pixels, texts, batch.sample_of_row).cpu().numpy())
        hypotheses += batch.flat
    own = local.model.config.known_answers or ()
    scores_NC = np.concatenate(scores)[:, [own.index(label) for label in ENTAILMENT_LABELS]]
    labels = [None if one.label is None else ENTAILMENT_LABELS.index(one.label) for one in hypotheses]
    figures = classification.accuracy(scores_NC, labels)
    for number, label in enumerate(ENTAILMENT_LABELS):
        rows = [row for row, one in enumerate(labels) if one == number]
        if rows:
            figures[label] = 100.0 * float((scores_NC[rows].argmax(axis=1) == number).mean())
    return Measured({"entailment": figures} | reader.left_out.figures())
