"""Which tokens masked language modelling hides, and behind what: the rules of ALBEF, of ViLT and VLMo, and of X-VLM.

All rules work on tensors of a batch, without waiting for a GPU. They differ in more than whole words: ALBEF draws each
token by itself, ViLT and VLMo fill a quota that counts padding, X-VLM one that does not and is filled to the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from capfilt.data.text.tokenizer import Tokenizer

MASKED = "masked"
"""The name of this draw among a task's `draws`."""
IGNORED = -100
"""The label of a token that is not to be guessed."""
HIDDEN, REPLACED = 0.8, 0.5
"""Of the chosen tokens so many become [MASK], and of the others so many a random token (BERT, arXiv 1810.04805)."""
MAX_NGRAM = 3
"""Pieces that X-VLM chooses at once, at most; at least two."""


@dataclass(frozen=True)
class Vocabulary:
    """What masking knows of the tokens of a vocabulary."""

    size: int
    pad: int
    cls: int
    sep: int
    mask: int
    continued_V: Tensor
    """True for the pieces that go on a word."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, device: torch.device | None = None) -> Vocabulary:
        """The vocabulary of a WordPiece tokenizer."""
        ids = (tokenizer.pad, tokenizer.cls, tokenizer.sep, tokenizer.mask)
        return cls(len(tokenizer), *ids, torch.from_numpy(tokenizer.continued).to(device))


class Masked(NamedTuple):
    """Texts with some tokens hidden, and what these were; both [B, T]."""

    ids_BT: Tensor
    labels_BT: Tensor
    """The token where it was chosen, -100 elsewhere."""


Rule = Callable[[Tensor, Vocabulary, float], Tensor]
"""(ids [B, T], vocabulary, rate) -> True for the tokens that are chosen, [B, T]."""


@torch.no_grad()
def mask_texts(ids_BT: Tensor, vocabulary: Vocabulary, rate: float, rule: Rule) -> Masked:
    """Choose tokens by `rule`; of these 80 % become [MASK], 10 % any token of the vocabulary, 10 % stay."""
    chosen = rule(ids_BT, vocabulary, rate)
    labels = ids_BT.masked_fill(~chosen, IGNORED)
    hidden = chosen & _happens(ids_BT, HIDDEN)
    replaced = chosen & ~hidden & _happens(ids_BT, REPLACED)
    ids = torch.where(replaced, torch.randint_like(ids_BT, vocabulary.size), ids_BT)
    return Masked(ids.masked_fill(hidden, vocabulary.mask), labels)


def single_tokens(ids_BT: Tensor, vocabulary: Vocabulary, rate: float) -> Tensor:
    """Each token with probability `rate`; never [CLS] and padding, but [SEP] like any other (ALBEF)."""
    return _happens(ids_BT, rate) & (ids_BT != vocabulary.pad) & (ids_BT != vocabulary.cls)


def whole_words(positions: int) -> Rule:
    """ViLT's and VLMo's rule, of texts padded to so many positions (transformers 4.2, `DataCollatorForWholeWordMask`).

    Words in random order until round(rate x `positions`) tokens are chosen, at least one; a word longer than what is
    left of that quota is passed over. Padding counts as words: it takes its share of the quota and is left out in the
    end. [CLS] and [SEP] are no words.
    """

    def rule(ids_BT: Tensor, vocabulary: Vocabulary, rate: float) -> Tensor:
        T = ids_BT.shape[1]
        padded = F.pad(ids_BT, (0, max(0, positions - T)), value=vocabulary.pad)
        return _fill_quota(padded, vocabulary, max(1, round(positions * rate)))[:, :T]

    return rule


def _fill_quota(ids_BT: Tensor, vocabulary: Vocabulary, quota: int) -> Tensor:
    """Whole words in random order, as long as they fit; [B, T]."""
    B, T = ids_BT.shape
    words = (ids_BT != vocabulary.cls) & (ids_BT != vocabulary.sep)
    first_BT = words & ~_continues(ids_BT, vocabulary)
    first_BT |= words & (words.cumsum(dim=1) == 1)  # the first token begins a word whatever it is
    word_BT = (first_BT.cumsum(dim=1) - 1).clamp(min=0)
    sizes_BT = torch.zeros_like(ids_BT).scatter_add(1, word_BT, words.long())
    used_B1 = ids_BT.new_zeros(B, 1)
    taken_BT = torch.zeros_like(words)
    numbers_T = torch.arange(T, device=ids_BT.device)
    for word_B1 in _shuffled(numbers_T <= word_BT.amax(dim=1, keepdim=True)):
        size_B1 = sizes_BT.gather(1, word_B1.clamp(min=0))
        fits_B1 = (word_B1 >= 0) & (used_B1 + size_B1 <= quota)
        taken_BT |= fits_B1 & (numbers_T == word_B1)
        used_B1 = used_B1 + size_B1 * fits_B1
    return taken_BT.gather(1, word_BT) & words & (ids_BT != vocabulary.pad)


def whole_ngrams(most: int, share: float) -> Rule:
    """X-VLM's rule: at most `most` tokens, whole words, a `share` of the draws two or three pieces wide.

    Positions in random order until min(`most`, round(rate x length)) tokens are chosen, at least one; each position
    brings its whole word, or that of all pieces of an n-gram. What is too much is dropped at random, so words may be
    chosen in part. A continuing piece behind [CLS] begins no word, and chooses nothing.
    """

    def rule(ids_BT: Tensor, vocabulary: Vocabulary, rate: float) -> Tensor:
        B, T = ids_BT.shape
        texts_BT = ids_BT != vocabulary.pad
        lengths_B1 = texts_BT.sum(dim=1, keepdim=True)
        quota_B1 = (lengths_B1.double() * rate).round().long().clamp(1, most)
        starts_BT, ends_BT = _word_bounds(_continues(ids_BT, vocabulary) & texts_BT)
        places_T = torch.arange(T, device=ids_BT.device)
        chosen_BT = torch.zeros_like(texts_BT)
        for place_B1 in _shuffled(texts_BT & (places_T > 0)):
            at_B1 = place_B1.clamp(min=0)
            width_B1 = torch.randint_like(at_B1, 2, MAX_NGRAM + 1)
            width_B1 = torch.where(_happens(at_B1, share), width_B1, torch.ones_like(at_B1))
            start_B1 = starts_BT.gather(1, at_B1)
            end_B1 = ends_BT.gather(1, (at_B1 + width_B1 - 1).clamp(max=T - 1))
            goes_on_B1 = (chosen_BT.sum(dim=1, keepdim=True) < quota_B1) & ~chosen_BT.gather(1, at_B1)
            goes_on_B1 &= (place_B1 >= 0) & (start_B1 > 0)
            chosen_BT |= goes_on_B1 & (places_T >= start_B1) & (places_T < end_B1) & texts_BT
        order_BT = torch.rand(B, T, device=ids_BT.device).masked_fill(~chosen_BT, 2.0).argsort(dim=1).argsort(dim=1)
        return chosen_BT & (order_BT < quota_B1)

    return rule


def _happens(like: Tensor, rate: float) -> Tensor:
    """True with probability `rate`, in the shape of `like`."""
    return torch.rand(like.shape, device=like.device) < rate


def _continues(ids_BT: Tensor, vocabulary: Vocabulary) -> Tensor:
    """True for the pieces that go on a word."""
    return vocabulary.continued_V[ids_BT.clamp(max=vocabulary.size - 1)]


def _shuffled(mask_BT: Tensor) -> Sequence[Tensor]:
    """The columns that are true in each row, in random order: T tensors [B, 1], -1 where there are no more."""
    keys_BT = torch.rand(mask_BT.shape, device=mask_BT.device).masked_fill(~mask_BT, 2.0)
    order_BT = keys_BT.argsort(dim=1)
    return order_BT.masked_fill(~mask_BT.gather(1, order_BT), -1).split(1, dim=1)


def _word_bounds(continued_BT: Tensor) -> tuple[Tensor, Tensor]:
    """For each token where its word starts, and behind its last piece; both [B, T]."""
    T = continued_BT.shape[1]
    places_BT = torch.arange(T, device=continued_BT.device).expand_as(continued_BT)
    starts_BT = places_BT.masked_fill(continued_BT, 0).cummax(dim=1).values
    # The word of token t ends where the next token that begins one stands, or at T.
    begins_BT = places_BT.masked_fill(continued_BT, T)
    following_BT = begins_BT.flip(1).cummin(dim=1).values.flip(1)
    ends_BT = torch.cat([following_BT[:, 1:], torch.full_like(following_BT[:, :1], T)], dim=1)
    return starts_BT, ends_BT
