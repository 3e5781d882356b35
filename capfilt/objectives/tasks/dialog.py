"""Visual dialog with the heads of pretraining: candidates are ranked by the one that matches, or written by a decoder.

A round's candidates are read beside its picture one by one; the cost of a step is that of so many texts a picture.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from capfilt.data.loading.dialog_rows import DialogRows
from capfilt.data.loading.loader import Batch
from capfilt.models.layers.precision import at_least_fp32
from capfilt.objectives.collectives import share_of_total
from capfilt.objectives.interface import DialogBatch, LossesAndMetrics, Task
from capfilt.objectives.kinds.downstream import DialogObjectives


class DialogTask(Task):
    """A model and the losses of its answers."""

    config: DialogObjectives

    def batch_of(self, loaded: Batch) -> DialogBatch:
        assert isinstance(loaded, DialogRows), "the loader of the task's rows"
        return DialogBatch(loaded.images, loaded.ids, loaded.mask, loaded.image_ids, loaded.answer, loaded.there)

    def example(self, pairs: int, tokens: int) -> DialogBatch:
        """A batch for counting operations, of ten candidates a round."""
        size, ids = self.model.config.image_size, torch.ones(10 * pairs, tokens, dtype=torch.long)
        there = torch.ones(pairs, 10, dtype=torch.bool)
        images = torch.empty(pairs, 3, size, size)
        return DialogBatch(images, ids, torch.ones_like(ids), torch.arange(pairs), ids.bool(), there)

    def compute_losses(self, batch: DialogBatch, progress: float) -> LossesAndMetrics:
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        tokens = self.model.encode_image(batch.images)
        context = None
        if "rank" in self.config.losses:
            context = self.model.image_context(tokens, "encoder")
            scores = log_odds(self.model.match(self.model.fuse(batch.ids_BT, batch.mask_BT, context)))
            scores = scores.view(batch.there_BC.shape).masked_fill(~batch.there_BC, -torch.inf)
            losses["rank"] = F.cross_entropy(scores, scores.new_zeros(len(scores), dtype=torch.long))
            metrics["rank_accuracy"] = (scores.argmax(dim=1) == 0).float().mean()
        if "lm" in self.config.losses:
            right = slice(None, None, batch.there_BC.shape[1])
            ids, mask, answer = batch.ids_BT[right], batch.mask_BT[right], batch.answer_BT[right]
            if context is None or not self.model.shares_image_context:
                context = self.model.image_context(tokens, "decoder")
            logits = self.model.decode(ids, mask, context)
            count = answer[:, 1:].sum()
            loss = -log_likelihoods(logits, ids, answer).sum() / count
            losses["lm"] = loss * share_of_total(count.to(loss.dtype))
        return losses, metrics


def log_odds(logits_N2: Tensor) -> Tensor:
    """Of logits of a head that matches, how much "matches" is above "does not" [N]: log(P / (1 - P))."""
    logits = at_least_fp32(logits_N2)
    return logits[:, 1] - logits[:, 0]


def log_likelihoods(logits_NTV: Tensor, ids_NT: Tensor, answer_NT: Tensor) -> Tensor:
    """log P of the marked tokens of each text [N], their sum. Logits at position t predict token t + 1."""
    nll_NT = F.cross_entropy(at_least_fp32(logits_NTV[:, :-1]).transpose(1, 2), ids_NT[:, 1:], reduction="none")
    return -(nll_NT * answer_NT[:, 1:]).sum(dim=1)
