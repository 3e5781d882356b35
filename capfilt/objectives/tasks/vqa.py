"""VQA by a decoder: every answer that people gave is learned, weighted by how many of them gave it.

A question is fused with its picture once, whatever the number of its answers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from capfilt.data.loading.loader import Batch
from capfilt.data.loading.task_rows import TaskRows
from capfilt.models.interface import Model
from capfilt.models.layers.precision import at_least_fp32
from capfilt.objectives.interface import AnswerBatch, LossesAndMetrics, Task
from capfilt.objectives.kinds.downstream import VqaObjectives
from capfilt.objectives.losses.itc import ramp
from capfilt.objectives.momentum import Momentum


class Vqa(Task):
    """A model that answers, with its momentum copy where targets are distilled (ALBEF)."""

    config: VqaObjectives

    def __init__(self, model: Model, config: VqaObjectives, prompt: int = 0):
        super().__init__(model, config, prompt)
        if config.has_momentum:
            self.momentum = Momentum(model, config.momentum, 0, config=model.config)

    def batch_of(self, loaded: Batch) -> AnswerBatch:
        assert isinstance(loaded, TaskRows), "the loader of the task's rows"
        answers = loaded.answer_ids, loaded.answer_mask, loaded.answer_row, loaded.answer_share
        return AnswerBatch(loaded.images, loaded.ids, loaded.mask, loaded.image_ids, *answers)

    def example(self, pairs: int, tokens: int) -> AnswerBatch:
        """A batch for counting operations: questions of one answer."""
        short = torch.ones(pairs, 4, dtype=torch.long)
        answers = short, short, torch.arange(pairs), torch.ones(pairs)
        return AnswerBatch(*super().example(pairs, tokens)[:4], *answers)

    def compute_losses(self, batch: AnswerBatch, progress: float) -> LossesAndMetrics:
        labels_AL = batch.answer_ids_AL[:, 1:].masked_fill(batch.answer_mask_AL[:, 1:] == 0, -100)
        logits_AVL = self._logits(self.model, batch).transpose(1, 2)
        smoothing = self.config.smoothing
        loss_A = F.cross_entropy(logits_AVL, labels_AL, reduction="none", label_smoothing=smoothing).sum(dim=1)
        if self.momentum is not None:
            alpha = ramp(progress, self.config.alpha, self.config.alpha_ramp) if self.alpha is None else self.alpha
            with torch.no_grad():
                soft_AVL = self._logits(self.momentum.model, batch).transpose(1, 2).softmax(dim=1)
            distilled_AL = -(soft_AVL * logits_AVL.log_softmax(dim=1)).sum(dim=1)
            distilled_A = (distilled_AL * (labels_AL != -100)).sum(dim=1)
            loss_A = (1 - alpha) * loss_A + alpha * distilled_A
        return {"answer": (batch.share_A * loss_A).sum() / len(batch.ids_BT)}, {}

    def _logits(self, model: Model, batch: AnswerBatch) -> Tensor:
        """What a model guesses of each token of each answer but the first, [A, L - 1, V]."""
        tokens = model.encode_image(batch.images)
        context = model.question_context(tokens, batch.ids_BT, batch.mask_BT).select(batch.question_A)
        return at_least_fp32(model.decode(batch.answer_ids_AL, batch.answer_mask_AL, context)[:, :-1])
