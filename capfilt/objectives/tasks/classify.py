"""Classes of texts beside pictures: visual entailment and NLVR2 by cross-entropy, VQA by binary cross-entropy.

A row whose answer is none of the model's classes has no part in the loss; the metric `outside` is the share of such
rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from capfilt.data.loading.loader import Batch
from capfilt.data.loading.task_rows import TaskRows
from capfilt.models.heads.classifier import Classifier
from capfilt.models.layers.precision import at_least_fp32
from capfilt.objectives.collectives import share_of_total
from capfilt.objectives.interface import ClassBatch, LossesAndMetrics, PairBatch, Task
from capfilt.objectives.kinds.classify import ClassifyObjectives, VqaClassesObjectives
from capfilt.objectives.losses.itc import ramp
from capfilt.objectives.momentum import Momentum

LIKENESS = 0.07
"""What cosines of pictures are divided by where one is drawn beside another (`Pretrain_nlvr.py`)."""


class Classification(Task):
    """A classifier and the loss of its classes."""

    model: Classifier
    config: ClassifyObjectives

    def __init__(self, model: Classifier, config: ClassifyObjectives, prompt: int = 0):
        super().__init__(model, config, prompt)
        self.number = {label: number for number, label in enumerate(model.config.labels)}
        if config.has_momentum:
            self.momentum = Momentum(model, config.momentum, 0, config=model.config)

    def batch_of(self, loaded: Batch) -> ClassBatch:
        """Texts with how right each class is."""
        assert isinstance(loaded, TaskRows), "the loader of the task's rows"
        targets = torch.zeros(len(loaded.ids), len(self.number))
        for row, answers in enumerate(loaded.answers):
            for answer, share in self.shares(answers):
                if answer in self.number:
                    targets[row, self.number[answer]] = share
        return ClassBatch(loaded.images, loaded.ids, loaded.mask, loaded.image_ids, targets)

    def shares(self, answers: tuple[tuple[str, int], ...]) -> list[tuple[str, float]]:
        """How right each answer is that people gave, and how often: the share of those who gave it; of VQA, where
        several may be right, what four or more gave is wholly right (VQA's accuracy, as ViLT rounds it)."""
        if self.several:
            return [(answer, min(1.0, 0.3 * count) if count < 4 else 1.0) for answer, count in answers]
        total = sum(count for _, count in answers)
        return [(answer, count / total) for answer, count in answers]

    def example(self, pairs: int, tokens: int) -> ClassBatch:
        size, ids = self.model.config.image_size, torch.ones(pairs, tokens, dtype=torch.long)
        images = torch.empty(self.model.config.pictures_of_text * pairs, 3, size, size)
        targets = torch.zeros(pairs, len(self.number))
        return ClassBatch(images, ids, torch.ones_like(ids), torch.arange(pairs), targets)

    def compute_losses(self, batch: ClassBatch, progress: float) -> LossesAndMetrics:
        tokens = self.model.encode_image(batch.images)
        logits = at_least_fp32(self.model.classify(tokens, batch.ids_BT, batch.mask_BT))
        known = batch.targets_BC.sum(dim=1) > 0
        loss = self.loss(logits, batch.targets_BC, known)
        if self.momentum is not None:
            alpha = ramp(progress, self.config.alpha, self.config.alpha_ramp) if self.alpha is None else self.alpha
            slow = self.momentum.model
            with torch.no_grad():
                guesses = slow.classify(slow.encode_image(batch.images), batch.ids_BT, batch.mask_BT)
            soft = at_least_fp32(guesses)
            soft = (soft.sigmoid() if self.several else soft.softmax(dim=1)) * known[:, None]
            loss = (1 - alpha) * loss + alpha * self.loss(logits, soft, known)
        right = batch.targets_BC.gather(1, logits.argmax(dim=1, keepdim=True))[:, 0] > 0
        return {"answer": loss}, {"accuracy": right.float().mean(), "outside": 1 - known.float().mean()}

    @property
    def several(self) -> bool:
        """Whether several classes of a row may be right, as in VQA."""
        return isinstance(self.config, VqaClassesObjectives)

    def loss(self, logits_BC: Tensor, targets_BC: Tensor, known_B: Tensor) -> Tensor:
        """Cross-entropy, of VQA binary cross-entropy summed over the classes: the mean over the rows of all processes
        that have an answer among the classes (ViLT's code leaves questions without one out)."""
        if self.several:
            loss_BC = F.binary_cross_entropy_with_logits(logits_BC, targets_BC, reduction="none") * known_B[:, None]
        else:
            loss_BC = -(targets_BC * logits_BC.log_softmax(dim=1))
        count = known_B.sum()
        loss = loss_BC.sum() / count.clamp(min=1)
        return loss * share_of_total(count.to(loss.dtype).clamp(min=1e-9))


class Assignment(Classification):
    """A classifier of two pictures that learns which of them a text is of: of two in three texts one of the sides, of
    the others neither (ALBEF's `Pretrain_nlvr.py`)."""

    def batch_of(self, loaded: Batch) -> PairBatch:  # type: ignore[override]
        return PairBatch(loaded.images, loaded.ids, loaded.mask, loaded.image_ids)

    def example(self, pairs: int, tokens: int) -> PairBatch:  # type: ignore[override]
        return Task.example(self, pairs, tokens)  # type: ignore[return-value]

    def compute_losses(self, batch: PairBatch, progress: float) -> LossesAndMetrics:  # type: ignore[override]
        """`forward` after `before_step`; a picture is encoded once, and each text is beside two of the batch."""
        tokens = self.model.encode_image(batch.images)
        labels, left, right = self.draws.take("assigned", lambda: self._assigned(tokens, batch.image_ids_B))
        beside = torch.cat([tokens.index_select(0, left), tokens.index_select(0, right)])
        logits = at_least_fp32(self.model.classify(beside, batch.ids_BT, batch.mask_BT))
        right_B = logits.argmax(dim=1) == labels
        return {"answer": F.cross_entropy(logits, labels)}, {"accuracy": right_B.float().mean()}

    @torch.no_grad()
    def _assigned(self, tokens_BND: Tensor, image_ids_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The class of each text, and the numbers of its left and its right picture: its own, or others."""
        B, device = len(image_ids_B), image_ids_B.device
        weights_BB = other_pictures(self.model.project_image(tokens_BND), image_ids_B)
        own, two = torch.arange(B, device=device), torch.multinomial(weights_BB, 2, replacement=B < 2)
        labels = torch.randint(3, (B,), device=device)
        return labels, torch.where(labels == 0, own, two[:, 0]), torch.where(labels == 1, own, two[:, 1])


def other_pictures(vectors_BP: Tensor, image_ids_B: Tensor) -> Tensor:
    """How likely each picture of a batch is drawn beside each, [B, B]: the likelier the more alike they are. The same
    picture is drawn where too few others are there, and else never."""
    weights_BB = (vectors_BP @ vectors_BP.T / LIKENESS).softmax(dim=1).clamp(min=1e-9)
    return weights_BB.masked_fill(image_ids_B[:, None] == image_ids_B[None], 1e-30)
