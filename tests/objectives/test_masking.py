"""The masking rules against slow, obvious ones that go token by token, by how often each token is chosen."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from capfilt.data.text.bert_tokenizers import BertTokenizer, OpenBertTokenizer
from capfilt.objectives.masking import (
    IGNORED,
    Rule,
    Vocabulary,
    mask_texts,
    single_tokens,
    whole_ngrams,
    whole_words,
)

ROWS = 6000
TOLERANCE = 0.04
"""Of a frequency over ROWS draws on both sides: more than four standard deviations."""
TEXT = "a red ring qxqx above a jjj ring"
POSITIONS = 24

Slow = Callable[[list[str], random.Random], set[int]]


def slow_words(tokens: list[str], draw: random.Random) -> set[int]:
    """ViLT's rule on a text padded to POSITIONS, word by word."""
    words: list[list[int]] = []
    for place, token in enumerate(tokens):
        if token in ("[CLS]", "[SEP]"):
            continue
        if words and token.startswith("##"):
            words[-1].append(place)
        else:
            words.append([place])
    draw.shuffle(words)
    quota, chosen = max(1, round(len(tokens) * 0.25)), []
    for word in words:
        if len(chosen) + len(word) <= quota:
            chosen += word
    return {place for place in chosen if tokens[place] != "[PAD]"}


def slow_ngrams(tokens: list[str], draw: random.Random) -> set[int]:
    """X-VLM's rule on a text without padding, position by position."""
    quota = min(5, max(1, round(len(tokens) * 0.25)))
    places = list(range(1, len(tokens)))
    draw.shuffle(places)
    chosen: set[int] = set()
    for place in places:
        if len(chosen) >= quota:
            break
        if place in chosen:
            continue
        start, end = place, place + (draw.randint(2, 3) if draw.random() < 0.4 else 1)
        while tokens[start].startswith("##"):
            start -= 1
        while end < len(tokens) and tokens[end].startswith("##"):
            end += 1
        if start > 0:
            chosen |= set(range(start, min(end, len(tokens))))
    return set(draw.sample(sorted(chosen), min(quota, len(chosen))))


def frequencies_of_slow(rule: Slow, tokens: list[str]) -> Tensor:
    draw = random.Random(0)
    counts = torch.zeros(len(tokens))
    for _ in range(ROWS):
        for place in rule(tokens, draw):
            counts[place] += 1
    return counts / ROWS


def chosen_in(rule: Rule, ids: Tensor, vocabulary: Vocabulary) -> Tensor:
    torch.manual_seed(0)
    return rule(ids.expand(ROWS, -1), vocabulary, 0.25)


@pytest.fixture(scope="module")
def open_text() -> tuple[Tensor, list[str], Vocabulary]:
    tokenizer = OpenBertTokenizer.load("world")
    ids, _ = tokenizer.encode([TEXT], 30)
    return torch.from_numpy(ids), [tokenizer.vocab[i] for i in ids[0]], Vocabulary.of(tokenizer)


def test_whole_words_are_chosen_as_often_as_word_by_word() -> None:
    tokenizer = BertTokenizer.load("world")
    ids, _ = tokenizer.encode([TEXT], 30)
    tokens = [tokenizer.vocab[i] for i in ids[0]]
    chosen = chosen_in(whole_words(POSITIONS), torch.from_numpy(ids), Vocabulary.of(tokenizer))
    slow = frequencies_of_slow(slow_words, tokens + ["[PAD]"] * (POSITIONS - len(tokens)))[: len(tokens)]
    assert torch.allclose(chosen.float().mean(dim=0), slow, atol=TOLERANCE)
    words = torch.tensor([not token.startswith("##") for token in tokens]).cumsum(0)
    for word in words.unique():
        of_word = chosen[:, words == word]
        assert bool((of_word.all(dim=1) == of_word.any(dim=1)).all()), "a word is chosen whole or not at all"


def test_ngrams_are_chosen_as_often_as_position_by_position(open_text: tuple[Tensor, list[str], Vocabulary]) -> None:
    ids, tokens, vocabulary = open_text
    chosen = chosen_in(whole_ngrams(5, 0.4), ids, vocabulary)
    assert torch.allclose(chosen.float().mean(dim=0), frequencies_of_slow(slow_ngrams, tokens), atol=TOLERANCE)
    assert int(chosen.sum(dim=1).max()) == min(5, round(len(tokens) * 0.25)), "the quota is the most"
    assert int(chosen.sum(dim=1).min()) >= 1


def test_a_piece_behind_cls_that_goes_on_a_word_chooses_nothing() -> None:
    tokenizer = OpenBertTokenizer.load("world")
    goes_on = next(i for i, token in enumerate(tokenizer.vocab) if token.startswith("##"))
    ids = torch.tensor([[tokenizer.cls, goes_on, goes_on]])
    assert not chosen_in(whole_ngrams(5, 0.0), ids, Vocabulary.of(tokenizer)).any()


def test_padding_changes_no_ngram_quota(open_text: tuple[Tensor, list[str], Vocabulary]) -> None:
    ids, _, vocabulary = open_text
    padded = torch.nn.functional.pad(ids, (0, 9), value=vocabulary.pad)
    chosen = chosen_in(whole_ngrams(5, 0.4), padded, vocabulary)
    assert not chosen[:, ids.shape[1] :].any()
    frequencies = chosen[:, : ids.shape[1]].float().mean(dim=0)
    assert torch.allclose(frequencies, chosen_in(whole_ngrams(5, 0.4), ids, vocabulary).float().mean(0), atol=TOLERANCE)


def test_single_tokens_leave_cls_and_padding_alone(open_text: tuple[Tensor, list[str], Vocabulary]) -> None:
    ids, _, vocabulary = open_text
    ids = torch.cat([ids, torch.tensor([[vocabulary.sep, vocabulary.pad]])], dim=1)
    frequencies = chosen_in(single_tokens, ids, vocabulary).float().mean(dim=0)
    assert frequencies[0] == 0
    assert frequencies[-1] == 0
    assert torch.allclose(frequencies[1:-1], torch.full_like(frequencies[1:-1], 0.25), atol=TOLERANCE)


def test_what_stands_in_the_place_of_chosen_tokens(open_text: tuple[Tensor, list[str], Vocabulary]) -> None:
    ids, _, vocabulary = open_text
    torch.manual_seed(0)
    many = ids.expand(ROWS, -1)
    masked = mask_texts(many, vocabulary, 0.5, single_tokens)
    chosen = masked.labels_BT != IGNORED
    assert torch.equal(masked.labels_BT[chosen], many[chosen])
    assert torch.equal(masked.ids_BT[~chosen], many[~chosen])
    of_chosen = masked.ids_BT[chosen]
    hidden = (of_chosen == vocabulary.mask).float().mean()
    kept = (of_chosen == many[chosen]).float().mean()
    # One random token in V is [MASK], or the token itself.
    assert abs(hidden - (0.8 + 0.1 / vocabulary.size)) < 0.01
    assert abs(kept - (0.1 + 0.1 / vocabulary.size)) < 0.01


@pytest.mark.parametrize("rule", [single_tokens, whole_words(8), whole_ngrams(5, 0.4)])
def test_a_text_of_nothing_has_nothing_to_hide(rule: Rule, open_text: tuple[Tensor, list[str], Vocabulary]) -> None:
    vocabulary = open_text[2]
    ids = torch.tensor([[vocabulary.cls, vocabulary.pad, vocabulary.pad]])
    masked = mask_texts(ids, vocabulary, 0.25, rule)
    assert torch.equal(masked.ids_BT, ids)
    assert bool((masked.labels_BT == IGNORED).all())
