"""Rounds of dialogs as token ids: what was said so far, the question, and a candidate answer.

    [CLS] caption [SEP] question answer [SEP] ... [SEP] question candidate [SEP]

Where that is too long, the beginning of what was said goes, so that the question stays beside the candidate. The same
ids are read by a fusion encoder and written by a decoder, which begin them with a mark of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from capfilt.data.tasks import Dialog
from capfilt.data.text.tokenizer import Tokenizer, padded
from capfilt.errors import TextError

MAX_WORDS = 100
"""Words of a turn at most; VisDial's longest captions have about 50."""
MIN_LENGTH = 8
"""Tokens of which something of every turn is left."""


class RoundText(NamedTuple):
    """A round with some of its candidates."""

    turns: tuple[str, ...]
    """The caption, each earlier question with its answer, and the question."""
    candidates: tuple[str, ...]


class CandidateIds(NamedTuple):
    """The candidates of rounds as tokens, one row each, those of a round adjacent."""

    ids_NT: NDArray[np.int64]
    mask_NT: NDArray[np.int64]
    """1 for text, 0 for padding."""
    answer_NT: NDArray[np.bool_]
    """Where the candidate is, its [SEP] included."""


def turns_of(dialog: Dialog, number: int) -> tuple[str, ...]:
    """What is said up to the question of round `number`, from 0. An earlier round without an answer is its question."""
    history = [f"{one.question} {one.answer or ''}".strip() for one in dialog.rounds[:number]]
    return dialog.caption, *history, dialog.rounds[number].question


def training_rounds(dialog: Dialog) -> list[RoundText]:
    """The rounds with a right candidate, which comes first, and others, each once."""
    rounds = []
    for number, one in enumerate(dialog.rounds):
        if one.gt_index is not None:
            candidates = tuple(dict.fromkeys((one.options[one.gt_index], *one.options)))
            if len(candidates) > 1:
                rounds.append(RoundText(turns_of(dialog, number), candidates))
    return rounds


def encode_candidates(tokenizer: Tokenizer, rounds: Sequence[RoundText], max_length: int) -> CandidateIds:
    """Rounds with their candidates as tokens, padded to the longest row.

    Candidates of a round have the same history before them, as much as beside the longest of them has room. A
    candidate of more than half of `max_length` is cut.

    Raises:
        TextError: `max_length` is below 8.
    """
    if max_length < MIN_LENGTH:
        raise TextError(f"max_length is {max_length}; a dialog needs {MIN_LENGTH} tokens at least, and some 100 better")
    rows: list[tuple[list[int], list[int]]] = []
    for turns, candidates in rounds:
        before = _joined(tokenizer, turns)
        after = [[*pieces[: max_length // 2], tokenizer.sep] for pieces in _pieces(tokenizer, candidates)]
        room = max_length - 1 - max(map(len, after), default=0)
        start = [tokenizer.cls, *before[max(0, len(before) - room) :]]
        rows += [(start, pieces) for pieces in after]
    ids, mask = padded([[*start, *pieces] for start, pieces in rows], tokenizer.pad)
    answer = np.zeros(ids.shape, np.bool_)
    for row, (start, pieces) in enumerate(rows):
        answer[row, len(start) : len(start) + len(pieces)] = True
    return CandidateIds(ids, mask, answer)


def _joined(tokenizer: Tokenizer, turns: Sequence[str]) -> list[int]:
    first, *others = _pieces(tokenizer, turns)
    return first + [id_ for pieces in others for id_ in (tokenizer.sep, *pieces)]


def _pieces(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, without marks."""
    if not texts:
        return []
    ids, mask = tokenizer.encode([tokenizer.clean(text, MAX_WORDS) for text in texts], 4 * MAX_WORDS)
    ends = mask.sum(axis=1) - int(tokenizer.closed)
    return [row[1:end].tolist() for row, end in zip(ids, ends, strict=True)]
