"""What every training task agrees on: a typed batch in, losses and metrics out, and a frozen config of its own.

The training room knows these classes alone. A task is one class in `objectives/tasks/` and one line in its table.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from capfilt.data.loading.loader import Batch
from capfilt.errors import RecipeError
from capfilt.models.interface import Model
from capfilt.objectives.draws import Draws
from capfilt.objectives.kinds import TaskConfig
from capfilt.objectives.masking import MASKED, Masked, Rule, Vocabulary, mask_texts
from capfilt.objectives.momentum import Momentum

LossesAndMetrics = tuple[dict[str, Tensor], dict[str, Tensor]]
"""Losses with gradients and metrics without, scalars by their names."""
Precision = Callable[[], AbstractContextManager[object]]
"""Makes the context in which forward passes run."""


class PairBatch(NamedTuple):
    """B pairs of an image and a text. A tuple, so that what wraps a task finds the tensors in it."""

    images: Tensor
    """Pictures [B, 3, S, S], normalised floats, or the kept features of a frozen tower [B, N, D]."""
    ids_BT: Tensor
    mask_BT: Tensor
    """1 for text, 0 for padding."""
    image_ids_B: Tensor
    """Equal numbers are the same image."""

    @property
    def rows(self) -> int:
        return self.ids_BT.shape[0]

    @property
    def device(self) -> torch.device:
        return self.ids_BT.device

    def to(self, device: torch.device) -> PairBatch:
        """The same on a device; pinned memory is copied while the host goes on."""
        return PairBatch(*(tensor.to(device, non_blocking=True) for tensor in self))

    def select(self, rows: slice) -> PairBatch:
        return PairBatch(*(tensor[rows] for tensor in self))

    def chunks(self, count: int) -> list[slice]:
        """The rows of `count` equal chunks. RecipeError where there are none."""
        if self.rows % count:
            raise RecipeError(
                f"a process has {self.rows} pairs of a batch, which micro_batches {count} does not divide"
            )
        size = self.rows // count
        return [slice(start, start + size) for start in range(0, self.rows, size)]


class RegionBatch(NamedTuple):
    """R texts, each of a part of one of B pictures or of a whole one."""

    images: Tensor
    """Pictures [B, 3, S, S], normalised floats."""
    ids_BT: Tensor
    """The texts, [R, T]."""
    mask_BT: Tensor
    image_ids_B: Tensor
    """[R]: equal numbers are the same image."""
    image_R: Tensor
    """The number of each text's picture among the B."""
    seen_RN: Tensor
    """1 for the image tokens that are in the part, 0 for others; [CLS], the first, is always 1."""
    boxes_R4: Tensor
    """Where the part is: center x, center y, width, height, in shares of the picture."""
    is_region_R: Tensor
    """False for whole pictures."""

    def to(self, device: torch.device) -> RegionBatch:
        """The same on a device; pinned memory is copied while the host goes on."""
        return RegionBatch(*(tensor.to(device, non_blocking=True) for tensor in self))


class ClassBatch(NamedTuple):
    """B texts, each beside one picture or several, and what is right of each."""

    images: Tensor
    """Pictures [B, 3, S, S], normalised floats; of tasks with two pictures a text [2 B, 3, S, S], the first of all
    texts first."""
    ids_BT: Tensor
    mask_BT: Tensor
    image_ids_B: Tensor
    targets_BC: Tensor
    """How right each class is, in [0, 1]; all 0 where none of them is."""

    def to(self, device: torch.device) -> ClassBatch:
        """The same on a device; pinned memory is copied while the host goes on."""
        return ClassBatch(*(tensor.to(device, non_blocking=True) for tensor in self))


class AnswerBatch(NamedTuple):
    """B questions, each beside a picture, and A answers that people gave to them."""

    images: Tensor
    """Pictures [B, 3, S, S], normalised floats."""
    ids_BT: Tensor
    mask_BT: Tensor
    image_ids_B: Tensor
    answer_ids_AL: Tensor
    answer_mask_AL: Tensor
    question_A: Tensor
    """The number of each answer's question among the B."""
    share_A: Tensor
    """How many of those who answered the question gave this answer, in (0, 1]."""

    def to(self, device: torch.device) -> AnswerBatch:
        """The same on a device; pinned memory is copied while the host goes on."""
        return AnswerBatch(*(tensor.to(device, non_blocking=True) for tensor in self))


class BoxBatch(NamedTuple):
    """B phrases, each beside a picture, and where in it they are."""

    images: Tensor
    """Pictures [B, 3, S, S], normalised floats."""
    ids_BT: Tensor
    mask_BT: Tensor
    image_ids_B: Tensor
    boxes_B4: Tensor
    """Center x, center y, width, height, in shares of the picture."""

    def to(self, device: torch.device) -> BoxBatch:
        """The same on a device; pinned memory is copied while the host goes on."""
        return BoxBatch(*(tensor.to(device, non_blocking=True) for tensor in self))


class DialogBatch(NamedTuple):
    """B pictures, and of a round about each C candidates behind what was said, adjacent; the first is right."""

    images: Tensor
    ids_BT: Tensor
    """[B * C, T]."""
    mask_BT: Tensor
    image_ids_B: Tensor
    answer_BT: Tensor
    """[B * C, T], true where the candidate itself is, with its end."""
    there_BC: Tensor
    """False for candidates that have no part in the loss."""

    def to(self, device: torch.device) -> DialogBatch:
        """The same on a device; pinned memory is copied while the host goes on."""
        return DialogBatch(*(tensor.to(device, non_blocking=True) for tensor in self))


StepBatch = PairBatch | RegionBatch | ClassBatch | AnswerBatch | BoxBatch | DialogBatch
"""What a step of any task is given."""


class Task(nn.Module, ABC):
    """A model with what its losses must remember; what data-parallel training wraps."""

    model: Model
    config: TaskConfig
    momentum: Momentum | None
    """The momentum copy and its queues, where the task has them."""
    draws: Draws
    """Whom `compute_losses` asks for everything that it draws at random; may be set to give it out instead."""
    vocabulary: Vocabulary | None
    """What masking knows of the texts' tokens; set where a training has a tokenizer of BERT's kind."""
    alpha: float | None
    """The weight of the momentum copy's soft targets; None: what the config says at this share of the training."""
    several_kinds: ClassVar[bool] = False
    """Whether steps differ in the weights that they reach."""
    chunks_enter_model: ClassVar[bool] = False
    """Whether `backward_in_chunks` calls the model's own methods, and not `compute_losses`."""

    def __init__(self, model: Model, config: TaskConfig, prompt: int = 0):
        """`prompt`: how many tokens each text begins with that are not learned, the first one included."""
        super().__init__()
        self.model, self.config, self.prompt = model, config, prompt
        self.momentum, self.draws, self.vocabulary, self.alpha = None, Draws(), None, None

    def batch_of(self, loaded: Batch) -> StepBatch:
        """What the loader read, as a step is given it."""
        return PairBatch(loaded.images, loaded.ids, loaded.mask, loaded.image_ids)

    def example(self, pairs: int, tokens: int) -> StepBatch:
        """A batch of so many texts of so many tokens each, whose numbers mean nothing: for counting operations."""
        size, ids = self.model.config.image_size, torch.ones(pairs, tokens, dtype=torch.long)
        return PairBatch(torch.empty(pairs, 3, size, size), ids, torch.ones_like(ids), torch.arange(pairs))

    def forward(self, batch: Any, progress: float) -> LossesAndMetrics:
        """One step's losses; `progress` is the share of the training that is done, in [0, 1)."""
        self.before_step()
        return self.compute_losses(batch, progress)

    def before_step(self) -> None:
        """What changes weights before any of them is used: the momentum copy moves towards the model; a task may also
        keep values in their range."""
        if self.momentum is not None and self.training:
            self.momentum.update(self.model)

    def after_step(self) -> None:
        """What changes weights after the optimizer did: values kept in their range, before any of them is saved."""

    @abstractmethod
    def compute_losses(self, batch: Any, progress: float) -> LossesAndMetrics:
        """`forward` after `before_step`."""

    def masked(self, ids_BT: Tensor, rate: float, rule: Rule) -> Masked:
        """Texts with some tokens hidden, for MLM: a draw by the name "masked"."""

        def draw() -> Masked:
            assert self.vocabulary is not None, "whoever builds the task sets what it masks with"
            return mask_texts(ids_BT, self.vocabulary, rate, rule)

        return self.draws.take(MASKED, draw)

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum, of those losses that are there, that is minimised."""
        weighted = [losses[name] * weight for name, weight in self.config.losses.items() if name in losses]
        return torch.stack(weighted).sum()

    def backward_in_chunks(
        self, batch: PairBatch, progress: float, chunks: int, precision: Precision
    ) -> LossesAndMetrics:
        """Add the gradients of the loss over the whole batch to the weights, with the memory of one chunk; losses and
        metrics as `forward`.

        Raises:
            RecipeError: a task that cannot; recipes are checked before (`TaskKind.unsupported`).
        """
        raise RecipeError("this training cannot go through a batch in chunks: set micro_batches to 1")
