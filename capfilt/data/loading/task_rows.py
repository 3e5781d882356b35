"""Batches of downstream tasks: texts about pictures, each with the answers that people gave.

Of a statement, which is about two pictures, the loader decodes both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from capfilt.data import shards
from capfilt.data.images import decode as images
from capfilt.data.images.augment import AugmentConfig, augment, generator
from capfilt.data.loading.config import LoaderConfig, RowKind
from capfilt.data.loading.dialog_rows import DialogLoader
from capfilt.data.loading.loader import Batch, Loader
from capfilt.data.loading.order import Span
from capfilt.data.loading.phrase_rows import PhraseLoader
from capfilt.data.loading.rows import Row, RowReader, count_pairs
from capfilt.data.loading.task_texts import Answers, texts_of
from capfilt.data.sample import FailedSample, Sample
from capfilt.data.tasks import right_picture
from capfilt.errors import DataError, ImageError


@dataclass(frozen=True)
class TaskRow(Row):
    """A text about a picture, or about it and the one to its right, before they are decoded."""

    answers: Answers
    right: bytes | None


@dataclass(frozen=True)
class TaskRows(Batch):
    """What a step of a downstream task is given; of two pictures a text, `images` has the left of all texts first, and
    then the right of all. A answers belong to B texts."""

    answers: tuple[Answers, ...]
    """Of each text."""
    answer_ids: Tensor
    """Every answer of every text as tokens, [A, L]."""
    answer_mask: Tensor
    answer_row: Tensor
    """[A]: the number of each answer's text among the B."""
    answer_share: Tensor
    """[A]: how many of those who answered that text gave it, in (0, 1]."""


_SIDE = re.compile(r"\b(left|right)\b", re.IGNORECASE)


def swapped(row: TaskRow) -> TaskRow:
    """A statement whose pictures have changed places, and left and right in the text with them."""
    assert row.right is not None, "a statement is about two pictures"
    text = _SIDE.sub(lambda side: "right" if side[0].lower() == "left" else "left", row.text)
    return replace(row, image=row.right, right=row.image, text=text)


class TaskReader(RowReader):
    """Reads the texts of one kind that spans of shards have."""

    def __init__(self, kind: RowKind, config: LoaderConfig, seed: int, counted: Mapping[str, int]):
        super().__init__(config.captions, {}, seed, counted)
        self.kind, self.swap = kind, config.swap

    def _rows(self, span: Span, epoch: int) -> Iterator[Row]:
        for sample in self._samples(span.url):
            right = None
            if self.kind == "statements":
                try:
                    right = right_picture(sample.extras)
                except DataError:  # counted as a picture that cannot be read
                    right = b""
            for number, (text, answers) in enumerate(texts_of(self.kind, sample.meta)):
                row = TaskRow(span.url, sample.uid, sample.image, text, answers, right)
                place = epoch, span.repetition, number, sample.uid
                swaps = self.swap and right and generator(self._seed, "swap", *place).random() < 0.5
                yield swapped(row) if swaps else row

    def _open(self, url: str) -> Iterator[Sample | FailedSample]:
        return shards.read(url, extras=self.kind == "statements")

    def _has_rows(self, sample: Sample) -> bool:
        return bool(texts_of(self.kind, sample.meta))


class TaskLoader(Loader):
    """An endless, seeded stream of batches of a downstream task for one rank of several."""

    def __init__(self, kind: RowKind, *args: Any, **options: Any):
        """As `Loader`, of rows of this kind.

        Raises:
            DataError: no sample has one with an answer, or what `Loader` raises.
        """
        self.kind = kind
        super().__init__(*args, **options)
        self._reader = TaskReader(kind, self.config, self.seed, self.order.rows)

    def _count(self, url: str) -> int:
        return count_pairs(url).of_tasks[self.kind]

    def _view(self, row: Row, number: int) -> Any:
        left = super()._view(row, number)
        assert isinstance(row, TaskRow)
        assert self.image_format is not None, "tasks are about pictures"
        if row.right is None or left is None:
            return left
        try:
            rng = generator(self.seed, "right", number, row.uid)
            return left, augment(images.decode(row.right), self.image_format, self._changes(row), rng)
        except ImageError:
            return None

    def _changes(self, row: Row) -> AugmentConfig:
        assert isinstance(row, TaskRow)
        said = (row.text, *(answer for answer, _ in row.answers)) if self.config.careful_flip else ()
        sided = any(side in one.lower() for side in ("left", "right") for one in said)
        return self.config.augment.model_copy(update={"flip": False}) if sided else self.config.augment

    def _made(self, rows: Sequence[Row], views: Sequence[Any], unreadable: int) -> Batch:
        if isinstance(views[0], tuple):
            views = [view[side] for side in (0, 1) for view in views]
        batch = super()._made(rows, views, unreadable)
        answers = tuple(row.answers for row in rows if isinstance(row, TaskRow))
        every = [
            (number, answer, count / sum(n for _, n in given))
            for number, given in enumerate(answers)
            for answer, count in given
        ]
        ids, mask = self.tokenizer.encode_answers([answer for _, answer, _ in every], self.config.max_length)
        return TaskRows(
            **{field.name: getattr(batch, field.name) for field in fields(Batch)},
            answers=answers,
            answer_ids=torch.from_numpy(ids),
            answer_mask=torch.from_numpy(mask),
            answer_row=torch.tensor([number for number, _, _ in every]),
            answer_share=torch.from_numpy(np.array([share for _, _, share in every], np.float32)),
        )


def loader_of(kind: RowKind, *args: Any, **options: Any) -> Loader:
    """The loader of a training whose rows are of this kind; arguments as of `Loader`."""
    match kind:
        case "captions":
            return Loader(*args, **options)
        case "rounds":
            return DialogLoader(*args, **options)
        case "phrases":
            return PhraseLoader(*args, **options)
    return TaskLoader(kind, *args, **options)
