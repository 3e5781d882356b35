"""Batches of rounds of dialogs: pictures, each with what was said, a question, and candidates for its answer.

Which wrong candidates a round is shown with is drawn anew in each epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from capfilt.data.images.augment import generator
from capfilt.data.loading.config import Captions
from capfilt.data.loading.loader import Batch, Loader
from capfilt.data.loading.order import Span
from capfilt.data.loading.rows import Row, RowReader, count_pairs
from capfilt.data.loading.task_texts import rounds_of
from capfilt.data.sample import Sample
from capfilt.data.text.dialog_texts import RoundText, encode_candidates


@dataclass(frozen=True)
class DialogRow(Row):
    """A round about a picture that is not decoded yet; `text` is its question."""

    round: RoundText
    """With the right candidate first."""


@dataclass(frozen=True)
class DialogRows(Batch):
    """What a step is given: of B pictures a round each, of which `ids` and `mask` have C candidates, adjacent, [B * C,
    T]; the first is the right one."""

    answer: Tensor
    """[B * C, T], true where the candidate itself is, with its end."""
    there: Tensor
    """[B, C], false for what fills up a round of fewer candidates: its right one again."""


class DialogReader(RowReader):
    """Reads the rounds that spans of shards have, each with `candidates` of its options."""

    def __init__(self, candidates: int, captions: Captions, seed: int, counted: Mapping[str, int]):
        super().__init__(captions, {}, seed, counted)
        self.candidates = candidates

    def _rows(self, span: Span, epoch: int) -> Iterator[Row]:
        for sample in self._samples(span.url):
            for number, (turns, (right, *wrong)) in enumerate(rounds_of(sample.meta)):
                rng = generator(self._seed, "candidates", epoch, span.repetition, number, sample.uid)
                drawn = rng.permutation(len(wrong))[: self.candidates - 1]
                shown = RoundText(turns, (right, *(wrong[i] for i in drawn)))
                yield DialogRow(span.url, sample.uid, sample.image, turns[-1], shown)

    def _has_rows(self, sample: Sample) -> bool:
        return bool(rounds_of(sample.meta))


class DialogLoader(Loader):
    """An endless, seeded stream of batches of rounds for one rank of several."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._reader = DialogReader(self.config.candidates, self.config.captions, self.seed, self.order.rows)

    def _count(self, url: str) -> int:
        return count_pairs(url).of_tasks["rounds"]

    def _made(self, rows: Sequence[Row], views: Sequence[Any], unreadable: int) -> Batch:
        rounds = [row.round for row in rows if isinstance(row, DialogRow)]
        size = self.config.candidates
        filled = [one._replace(candidates=_filled(one.candidates, size)) for one in rounds]
        made = encode_candidates(self.tokenizer, filled, self.config.max_length)
        there = torch.tensor([[place < len(one.candidates) for place in range(size)] for one in rounds])
        batch = super()._made(rows, views, unreadable)
        return DialogRows(
            **{field.name: getattr(batch, field.name) for field in fields(Batch)}
            | {"ids": torch.from_numpy(made.ids_NT), "mask": torch.from_numpy(made.mask_NT)},
            answer=torch.from_numpy(made.answer_NT),
            there=there,
        )


def _filled(candidates: tuple[str, ...], size: int) -> tuple[str, ...]:
    return candidates + candidates[:1] * (size - len(candidates))
