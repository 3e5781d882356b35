"""Rules about a text alone: its length, its repetitions, its language, what pages write beside every picture.

They are computed when a policy is applied and are no columns: another rule needs no model, only another `select`. A
language is guessed, and of a few words badly, so only a text that is clearly of another language breaks that rule.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

from pydantic import field_validator

from capfilt.config import Config, added
from capfilt.errors import RecipeError, did_you_mean

CLEARLY = 0.5
"""The probability from which on a text is taken to be of a language."""

_URL = re.compile(r"https?://|www\.|(?<![a-z0-9-])[a-z0-9-]{1,63}\.(?:com|net|org|info|co\.uk)\b", re.IGNORECASE)
_BOILERPLATE = re.compile(
    r"^(?:click (?:here )?(?:to|for) (?:enlarge|zoom|view|see|open|larger)|embedded image permalink"
    r"|profile (?:photo|picture)|(?:untitled|image|img|photo|picture|thumbnail|logo|icon|placeholder)[\s_-]*\d*$)"
    r"|(?:stock (?:photos?|images?|illustrations?|vectors?)|royalty[- ]free|click to (?:enlarge|zoom))$"
    r"|^[\w-]+\.(?:jpe?g|png|gif|webp|bmp|tiff?)$|^(?:img|dsc[nf]?|p)[_-]?\d{3,}$|^\d{2,5}\s?x\s?\d{2,5}$",
    re.IGNORECASE,
)
"""What CC3M (Sharma et al. 2018, section 3) names: `click to enlarge picture`, `embedded image permalink`, `profile
photo` and `stock photo` at the beginning or the end; and what is a file name or a size and nothing else."""


class TextRules(Config):
    """What a text must be, whatever its scores; a rule that is left out holds for every text."""

    min_words: int = added(0, ge=0)
    """Words, divided by white space, at least. ALIGN and CC12M: 3."""
    max_words: int = added(0, ge=0)
    """Words at most; 0 = any number. ALIGN: 20; CC12M: 256."""
    min_characters: int = added(0, ge=0)
    """Characters at least. LAION: 5; DataComp: 6."""
    max_repetition: float | None = added(None, ge=0, lt=1)
    """The share of a text's words that it has had before, in lower case, at most. CC12M: 0.2."""
    max_digits_share: float | None = added(None, ge=0, lt=1)
    """The share of digits among its characters other than white space, at most."""
    languages: tuple[str, ...] = added(())
    """Codes of languages (`en`) of which a text may be: one that is clearly of another, by py3langid with a probability
    of 0.5, is dropped. Needs `pip install 'capfilt[language]'`."""
    no_urls: bool = added(False)
    """Whether texts with a web address are dropped."""
    no_boilerplate: bool = added(False)
    """Whether texts are dropped that pages write beside any picture (`click to enlarge`, at the end `stock photo`), and
    those that are a file name or a size alone."""

    @field_validator("languages", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def broken(self, text: str) -> str:
        """The first rule that a text breaks, in words; "" where it keeps them all."""
        words = text.split()
        if len(words) < self.min_words:
            return f"fewer than {self.min_words} words"
        if self.max_words and len(words) > self.max_words:
            return f"more than {self.max_words} words"
        if len(text.strip()) < self.min_characters:
            return f"fewer than {self.min_characters} characters"
        if self.max_repetition is not None and repetition(words) > self.max_repetition:
            return "words repeat"
        if self.max_digits_share is not None and digits_share(text) > self.max_digits_share:
            return "too many digits"
        if self.no_urls and _URL.search(text):
            return "web address"
        if self.no_boilerplate and _BOILERPLATE.search(text.strip(" \t\r\n.,;:!|-")):
            return "boilerplate"
        return f"not in {', '.join(self.languages)}" if self.languages and _is_foreign(text, self.languages) else ""

    def check(self) -> None:
        """Refuse languages that cannot be told here. RecipeError."""
        if not self.languages:
            return
        if find_spec("py3langid") is None:
            raise RecipeError("rules.languages needs py3langid: pip install 'capfilt[language]', or leave it out.")
        known = sorted(set(_identifier().labels))
        if unknown := [code for code in self.languages if code not in known]:
            near = did_you_mean(unknown[0], known)
            raise RecipeError(f"rules.languages has {unknown[0]!r}.{near} There are: {', '.join(known)}.")


def repetition(words: Sequence[str]) -> float:
    """The share of the words that came before in the same text, in lower case; 0 without words."""
    return 1 - len({word.lower() for word in words}) / len(words) if words else 0.0


def digits_share(text: str) -> float:
    """The share of decimal digits among the characters other than white space; 0 without any."""
    characters = "".join(text.split())
    return sum(character.isdecimal() for character in characters) / len(characters) if characters else 0.0


def language(text: str) -> tuple[str, float]:
    """The likeliest language of a text and its probability, by py3langid's naive Bayes over byte n-grams."""
    code, probability = _identifier().classify(text)
    return code, probability


def _is_foreign(text: str, allowed: Sequence[str]) -> bool:
    code, probability = language(text)
    return code not in allowed and probability >= CLEARLY


@cache
def _identifier() -> Any:
    """The identifier, whose model takes a second or two to load, once a process."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # type: ignore[import-untyped]

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
