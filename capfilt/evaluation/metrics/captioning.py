"""Captioning: BLEU-4, CIDEr and the diversity of the captions, in plain Python.

The formulas are those of pycocoevalcap 1.2, which BLIP and X-VLM report, but texts are split into words by a
rule of our own (`words`), because theirs is a Java program: where captions hold more than plain words,
published numbers differ a little.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from capfilt.errors import DataError

MAX_ORDER = 4
CIDER_SIGMA = 6.0
"""Width, in words, of the Gaussian that punishes a length unlike the reference's."""

# Scripts without spaces between words: Han, kana and bopomofo; and the letters of Thai, Lao, Myanmar and Khmer.
_HAN_AND_KANA = (
    "\u3005-\u3007\u3021-\u3029\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u3105-\u312f\u31a0-\u31bf"
    "\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_SOUTH_EAST_ASIA = ((0x0E00, 0x0F00), (0x1000, 0x10A0), (0x1780, 0x1800), (0xA9E0, 0xAA00), (0xAA60, 0xAA80))
_UNSPACED = _HAN_AND_KANA + "".join(
    letter for start, stop in _SOUTH_EAST_ASIA for letter in map(chr, range(start, stop)) if letter.isalpha()
)
# Vowel signs and tones, which are written onto the letter before them and which `\w` leaves out: of Hebrew and all that
# follows it in Unicode.
_MARKS = "".join(sign for sign in map(chr, range(0x0591, 0x1DC0)) if unicodedata.category(sign) in ("Mn", "Mc"))
_LETTER = rf"(?:[^\W{_UNSPACED}][{_MARKS}]*)"

_CLITIC = r"'(?:s|m|d|re|ve|ll)\b"
_TOKEN = re.compile(
    rf"[{_UNSPACED}][{_MARKS}]*"
    rf"|{_LETTER}+?(?=n't\b)|n't\b|{_CLITIC}"
    rf"|{_LETTER}+(?:[-/]{_LETTER}+|(?<=\d)[.,:]\d{_LETTER}*|(?!{_CLITIC})'{_LETTER}+)*|\S",
)
_CHARACTER = re.compile(f"[{_UNSPACED}]")
_DROPPED = frozenset(
    "'\"`.?!,:-;(){}\u2018\u2019\u201c\u201d\u2013\u2014\u2026"
    "、。，．！？：；（）「」『』《》〈〉【】〔〕・～､｡｢｣､･"
    "ฯ၊။។៕،؛؟।॥"
)
"""pycocoevalcap's list of what is not a word, character by character, its typographic forms, and those of other
scripts."""

Ngram = tuple[str, ...]


class _Vector(NamedTuple):
    """A text as CIDEr sees it: weight of each n-gram, norm of each order's weights, number of words."""

    weights: dict[Ngram, float]
    norms: list[float]
    length: int


def words(text: str) -> list[str]:
    """Split a caption into lower-case words, punctuation dropped; in scripts without spaces every character is a word.

    The rule: hyphens and slashes stay inside a word (t-shirt), points, commas and colons inside a number
    (3.5), 's 'm 'd 're 've 'll and n't are words of their own (dog 's, is n't), any other symbol is a word
    ($, &, %), and quotes, round and curly brackets and . ? ! , : ; - are dropped, as in pycocoevalcap's list.
    What the Penn Treebank does by lists of words is left out: U.S. loses its points, cannot stays one word.
    A character of Chinese, Japanese, Thai, Lao, Khmer or Myanmar stands alone, with the vowel signs and tones that are
    written onto it, as is reported of Chinese captions.
    """
    return [token for token in _TOKEN.findall(text.lower().replace("\u2019", "'")) if token not in _DROPPED]


def tokenisation(texts: Iterable[str]) -> str:
    """By what texts were scored: "words", "characters" (of scripts without spaces), or "words and characters"."""
    kinds = {bool(_CHARACTER.match(token)) for text in texts for token in words(text)}
    return {frozenset({True}): "characters", frozenset({True, False}): "words and characters"}.get(
        frozenset(kinds), "words"
    )


def bleu4(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Measure corpus BLEU-4 in percent, any number of references an image (Papineni et al. 2002).

    Matches and lengths are summed over the corpus before the one division. The length to reach is, image by
    image, that of the closest reference, the shorter of two equally close (pycocoevalcap's rule; torchmetrics
    takes the first). Without a single 4-gram in common the score is 0: pycocoevalcap adds 1e-15, which makes
    up to 3 points of nothing from captions of three words.

    An empty candidate counts as a caption of no words. With no candidates, {} is returned. Raises DataError
    when the lists differ in length or an image has no reference.
    """
    _check(candidates, references)
    if not candidates:
        return {}
    matched, offered = [0] * MAX_ORDER, [0] * MAX_ORDER
    length = wanted_length = 0
    for candidate, texts in zip(candidates, references, strict=True):
        written, wanted = words(candidate), [words(text) for text in texts]
        length += len(written)
        wanted_length += min((abs(len(tokens) - len(written)), len(tokens)) for tokens in wanted)[1]
        most: Counter[Ngram] = Counter()
        for tokens in wanted:
            most |= _ngrams(tokens)
        for ngram, count in _ngrams(written).items():
            matched[len(ngram) - 1] += min(count, most[ngram])
            offered[len(ngram) - 1] += count
    if not all(matched):
        return {"bleu4": 0.0}
    log_precision = sum(math.log(hits / tries) for hits, tries in zip(matched, offered, strict=True)) / MAX_ORDER
    brevity = min(0.0, 1.0 - wanted_length / length)
    return {"bleu4": 100.0 * math.exp(log_precision + brevity)}


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Measure CIDEr in the units papers print: 130.1 is pycocoevalcap's 1.301 (Vedantam et al. 2015).

    Texts become vectors of n-gram counts times log(images / images whose references hold the n-gram), for
    each order 1 to 4; a candidate earns the cosine with each reference, its weights clipped to the
    reference's, times exp(-(difference in words)^2 / 72), averaged over orders and references, times 10. This
    is what pycocoevalcap calls Cider: like CIDEr-D it clips and punishes length, but counts are not divided
    by the length of the text.

    The document frequencies come from `references` themselves, so a part of a split scores unlike the whole,
    and a single image (every weight is log 1 = 0) cannot be scored: with fewer than 2, {} is returned. An
    empty candidate earns 0. Raises DataError when the lists differ in length or an image has no reference.
    """
    _check(candidates, references)
    if len(candidates) < 2:
        return {}
    wanted = [[words(text) for text in texts] for texts in references]
    images_with: Counter[Ngram] = Counter()
    for texts in wanted:
        images_with.update(set().union(*map(_ngrams, texts)))
    rarity = {ngram: math.log(len(candidates) / images) for ngram, images in images_with.items()}
    unseen = math.log(len(candidates))
    total = 0.0
    for candidate, texts in zip(candidates, wanted, strict=True):
        vector = _vector(words(candidate), rarity, unseen)
        total += sum(_likeness(vector, _vector(tokens, rarity, unseen)) for tokens in texts) / len(texts)
    return {"cider": 100.0 * 10.0 * total / len(candidates)}


def diversity(candidates: Sequence[str]) -> dict[str, float]:
    """Measure how varied captions are, as shares in [0, 1]: distinct1, distinct2 and repeated.

    distinctN is the number of different n-grams over the number of all (Li et al. 2016); it falls as a corpus
    grows, so compare equal numbers of captions only. repeated is the share of captions whose words another
    caption has too. What has nothing to divide by (no captions, no captions of two words) is absent.
    """
    token_lists = [words(candidate) for candidate in candidates]
    figures = {}
    for order in (1, 2):
        ngrams = [ngram for tokens in token_lists for ngram in _of_order(tokens, order)]
        if ngrams:
            figures[f"distinct{order}"] = len(set(ngrams)) / len(ngrams)
    if token_lists:
        times = Counter(map(tuple, token_lists))
        figures["repeated"] = sum(count for count in times.values() if count > 1) / len(token_lists)
    return figures


def _ngrams(tokens: list[str]) -> Counter[Ngram]:
    counts: Counter[Ngram] = Counter()
    for order in range(1, MAX_ORDER + 1):
        counts.update(_of_order(tokens, order))
    return counts


def _of_order(tokens: list[str], order: int) -> Iterable[Ngram]:
    return zip(*(tokens[start:] for start in range(order)), strict=False)


def _vector(tokens: list[str], rarity: dict[Ngram, float], unseen: float) -> _Vector:
    weights = {ngram: count * rarity.get(ngram, unseen) for ngram, count in _ngrams(tokens).items()}
    squares = [0.0] * MAX_ORDER
    for ngram, weight in weights.items():
        squares[len(ngram) - 1] += weight * weight
    return _Vector(weights, [math.sqrt(square) for square in squares], len(tokens))


def _likeness(written: _Vector, wanted: _Vector) -> float:
    """Mean over orders of the clipped cosine, times the length penalty.

    pycocoevalcap takes the number of bigrams for the length; the differences are the same unless a text is
    empty, which earns 0 anyway.
    """
    dots = [0.0] * MAX_ORDER
    for ngram, weight in written.weights.items():
        other = wanted.weights.get(ngram, 0.0)
        dots[len(ngram) - 1] += min(weight, other) * other
    norms = zip(dots, written.norms, wanted.norms, strict=True)
    cosines = sum(dot / (a * b) for dot, a, b in norms if a and b)
    return cosines / MAX_ORDER * math.exp(-((written.length - wanted.length) ** 2) / (2 * CIDER_SIGMA**2))


def _check(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(candidates) != len(references):
        raise DataError(
            f"{len(candidates)} captions but references for {len(references)} images; "
            "there must be one caption an image."
        )
    for index, texts in enumerate(references):
        if isinstance(texts, str):
            raise DataError(f"the references of image {index} are one string; they must be a list, even of one text.")
        if not texts:
            raise DataError(f"image {index} has no reference; give it at least one, or leave it out of the evaluation.")
