"""NLVR2: whether a statement about two pictures is true, and whether all pairs of one sentence are answered right."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from capfilt.data.loading.task_texts import TRUE_FALSE
from capfilt.data.tasks import Statement, statements_of
from capfilt.evaluation.metrics import nlvr2
from capfilt.evaluation.tasks import Measured
from capfilt.evaluation.tasks.config import Nlvr2EvalConfig
from capfilt.evaluation.tasks.rows import RowReader
from capfilt.inference.answers import classify
from capfilt.inference.local_model import LocalModel


def measure(local: LocalModel, urls: Sequence[str], config: Nlvr2EvalConfig, device: torch.device) -> Measured:
    """Accuracy and consistency over the statements of shards. DataError where there is none."""
    how = (config.batch_size, device)
    reader = RowReader(local, lambda sample, failed: statements_of(sample.meta, failed), *how, pairs=True)
    true = (local.model.config.known_answers or ()).index(TRUE_FALSE[True])
    statements: list[Statement] = []
    answers: list[bool] = []
    for batch in reader.batches(urls):
        likely_RC = classify(local, batch.pixels, [one.text for one in batch.flat], batch.sample_of_row)
        answers += (likely_RC.argmax(dim=1) == true).tolist()
        statements += batch.flat
    labels, groups = [one.label for one in statements], [one.group for one in statements]
    return Measured({"nlvr2": nlvr2.accuracy(answers, labels, groups)} | reader.left_out.figures())
