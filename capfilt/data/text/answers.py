"""Answers to questions as VQAv2 compares them: its text normalisation, its accuracy, and targets made of both.

The official scorer normalises only where the annotators disagree, and then both sides, prediction and annotators
(since its correction of March 2021; the copies in other repositories are older and give other figures). So "Yes."
earns nothing where all ten say "yes".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

ENOUGH = 3
"""So many annotators who say the same make an answer wholly right."""

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_WITH_COMMA = re.compile(r"\d,\d")
# The official pattern begins with `(?!<=\d)`, a slip that always holds: a point goes unless a digit follows it. Its
# flags are passed as the count, so that 32 points go and no more.
_POINT = re.compile(r"\.(?!\d)")
_MAX_POINTS = int(re.UNICODE)
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
_CONTRACTED = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've"
    " he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't"
    " not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll"
    " somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd"
    " there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll"
    " what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's"
    " won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
)


# Words with an apostrophe too few, and one that loses its own: so the official table has it.
_CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word for word in _CONTRACTED.split() for at, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}


@lru_cache(maxsize=10**5)
def normalise(answer: str) -> str:
    """An answer as VQAv2 compares it: without punctuation and articles, in lower case, numbers up to ten as digits."""
    return _words(_without_punctuation(one_line(answer)))


def one_line(text: str) -> str:
    """Line ends and tabs become spaces: all that is done to answers on which every annotator agrees."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def soft_accuracy(answer: str, references: Sequence[str]) -> float | None:
    """VQAv2's accuracy of one answer, in [0, 1]: the mean, over the sets that leave one annotator out, of
    min(annotators who say the same / 3, 1). None without an annotator.

    With ten annotators 0, 1, 2, 3, 4 who say the same are 0, 0.3, 0.6, 0.9, 1. With fewer than four the official rule
    cannot give 1 to any answer; here all who are left suffice, and one annotator alone is right or wrong.
    """
    if not references:
        return None
    wanted = [one_line(reference) for reference in references]
    given = one_line(answer)
    if len(set(wanted)) > 1:
        wanted = [_words(_without_punctuation(reference)) for reference in wanted]
        given = _words(_without_punctuation(given))
    return _leave_one_out(wanted.count(given), len(wanted))


def soft_targets(references: Sequence[str]) -> dict[str, float]:
    """What a classifier is trained towards: each normalised answer of the annotators and its accuracy, above 0."""
    counts = Counter(map(normalise, references))
    return {answer: _leave_one_out(count, len(references)) for answer, count in counts.items()}


def _leave_one_out(same: int, annotators: int) -> float:
    """The mean over the subsets: `same` of them lack one who says the same."""
    if annotators == 1:
        return float(same)
    enough = min(ENOUGH, annotators - 1)
    total = same * min(same - 1, enough) + (annotators - same) * min(same, enough)
    return total / (annotators * enough)


def _without_punctuation(text: str) -> str:
    """Signs beside a space, or in a text with a number such as 1,000, go; others become a space."""
    joined = _NUMBER_WITH_COMMA.search(text) is not None
    out = text
    for sign in _PUNCTUATION:
        goes = joined or f"{sign} " in text or f" {sign}" in text
        out = out.replace(sign, "" if goes else " ")
    return _POINT.sub("", out, count=_MAX_POINTS)


def _words(text: str) -> str:
    digits = (_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in digits if word not in _ARTICLES)
