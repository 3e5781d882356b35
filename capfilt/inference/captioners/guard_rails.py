"""What of a model's answer is the caption: rules that cut what a caption does not say, or drop the whole answer.

Pure functions. Each change is named, so that annotations can say what was done to a text, and a run can count it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from capfilt.data.sample import is_text

if TYPE_CHECKING:
    from capfilt.inference.config import VlmConfig

Rule = Literal["thinking", "fence", "preamble", "quotes", "refusal", "leak", "opener"]

COPIES = "copies the web text"
"""The remark of a caption that is mostly the web text again."""
MAX_ANSWER = 10_000
"""Characters of an answer that are read."""
LEAKED_WORDS = 6
"""So many words in a row of what was asked are a leak of it."""
_RUN = 3  # words
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")
"""Characters that are no part of a text: control characters, and marks that change how others are shown."""

_THOUGHT = r"(?:think|thinking|thought|reasoning|reflection)"
_CLOSED = re.compile(rf"<({_THOUGHT})>.*?</\1>", re.DOTALL | re.IGNORECASE)
_UNOPENED = re.compile(rf"^.*</{_THOUGHT}>", re.DOTALL | re.IGNORECASE)
_UNCLOSED = re.compile(rf"<{_THOUGHT}>.*$", re.DOTALL | re.IGNORECASE)
_FENCE = re.compile(r"```[\w-]*[ \t]*\n?(.*?)(?:```|\Z)", re.DOTALL)
_PREAMBLE = re.compile(
    r"^(?:(?:sure|certainly|of course|okay|ok|absolutely|great)\b[^\w\n]{0,3}\s*)?"
    r"(?:here(?:'s| is| are)\b[^:\n]{0,80}:"
    r"|\W{0,3}(?:caption|description|answer|corrected text|text|output)\W{0,3}:\W{0,3}(?=\s))\s*"
    r"|^(?:sure|certainly|of course|absolutely)[!,.]\s+",
    re.IGNORECASE,
)
_QUOTES = (('"', '"'), ("'", "'"), ("“", "”"), ("‘", "’"), ("«", "»"), ("„", "“"), ("「", "」"), ("`", "`"))
_REFUSAL = re.compile(
    r"\bas an? (?:ai|artificial intelligence|language model)\b"
    r"|^\W{0,3}(?:i['’]?m|i am) (?:really |very |so )?(?:sorry|unable|not able)\b"
    r"|^\W{0,3}(?:sorry|apologies|unfortunately)\b[^.!?\n]{0,40}\bi\b"
    r"|^\W{0,3}i (?:cannot|can['’]?t|could not|couldn['’]?t|do not|don['’]?t|won['’]?t|will not)\b"
    r"|^\W{0,3}(?:no|there is no|there was no) image (?:was |is |has been )?(?:provided|attached|given|visible)\b",
    re.IGNORECASE,
)
_MEDIUM = r"(?:image|picture|photo|photograph|illustration|scene|graphic|screenshot)"
_SHOWS = (
    r"(?:shows?|depicts?|features?|displays?|captures?|presents?|portrays?|illustrates?|showcases?|contains?"
    r"|is (?:showing|depicting|of)|appears to (?:show|depict|be))"
)
_OPENER = re.compile(
    rf"^(?:in (?:this|the) {_MEDIUM},?\s+(?:(?:we|you|one) (?:can )?see|there (?:is|are))"
    rf"|(?:this|the|an?) (?:\w+ ){{0,2}}{_MEDIUM} (?:also )?{_SHOWS}(?: (?:us|that))?"
    rf"|(?:this|it) is an? (?:[\w-]+ ){{0,4}}{_MEDIUM} (?:of|showing|depicting|that shows)"
    rf"|in (?:this|the) {_MEDIUM},)\s+",
    re.IGNORECASE,
)
_LEAK = re.compile(
    r"\b(?:the|this|your|an?) (?:(?:provided|given|supplied|original|accompanying|web|alt|attached)[ -]){1,2}"
    r"(?:text|alt[ -]text|caption|description|prompt|information)\b"
    r"|\balt[ -]text\b|\bweb text\b|\bthe (?:user|prompt|instructions?)\b",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"[^.!?。！？\n]*(?:[.!?。！？]+|\n|$)\s*")


class Guarded(NamedTuple):
    """What is left of an answer, and what was done to it (`Caption.remark`)."""

    text: str
    remark: str


def guard(answer: str, config: VlmConfig, asked: str = "", web: str = "") -> Guarded:
    """The caption in an answer.

    Args:
        asked: the template of the prompt, of which a caption must not repeat LEAKED_WORDS words.
        web: the web text of the image, of which a caption that copies it is marked.
    """
    text = _stripped(_stopped(answer[:MAX_ANSWER], config.stop), config.strip)
    if not is_text(text):
        return Guarded("", "caption failed: empty")
    done: list[str] = []
    for rule in config.rules:
        before, text = text, _TABLE[rule](text, asked)
        if not is_text(text):
            return Guarded("", f"caption dropped: {rule}")
        if text != before:
            done.append(f"cut: {rule}")
            text = _stripped(text, config.strip)
    text = " ".join(CONTROL.sub(" ", text).split()).rstrip("\ufffd ")
    if not is_text(text):
        return Guarded("", "caption failed: empty")
    if copied_share(text, web) >= config.copy_share:
        done.append(COPIES)
    return Guarded(text, "; ".join(done))


def copied_share(text: str, web: str) -> float:
    """The share of a text's runs of three words (of all its words where it has fewer) that a web text has too, whatever
    their capitals; in [0, 1]."""
    words, others = _words(text), _words(web)
    size = min(_RUN, len(words))
    runs = _runs(words, size)
    known = set(_runs(others, size))
    return sum(run in known for run in runs) / len(runs) if runs else 0.0


def _stopped(text: str, stops: Sequence[str]) -> str:
    return text[: min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=len(text))]


def _stripped(text: str, phrases: Sequence[str]) -> str:
    """Without white space and the phrases at both ends."""
    before, text = "", text.strip()
    while text != before:
        before = text
        for phrase in (phrase.strip() for phrase in phrases):
            if phrase and text.casefold().startswith(phrase.casefold()):
                text = text[len(phrase) :].strip()
            if phrase and text.casefold().endswith(phrase.casefold()):
                text = text[: -len(phrase)].strip()
    return text


def _thinking(text: str, _asked: str) -> str:
    return _UNCLOSED.sub("", _UNOPENED.sub("", _CLOSED.sub("", text)))


def _fence(text: str, _asked: str) -> str:
    return _FENCE.sub(r"\1", text)


def _preamble(text: str, _asked: str) -> str:
    return _capital(_PREAMBLE.sub("", text, count=1), text)


def _quotes(text: str, _asked: str) -> str:
    text = text.strip()
    for left, right in _QUOTES:
        inner = text[1:-1]
        if len(text) > 2 and text[0] == left and text[-1] == right and left not in inner and right not in inner:
            return inner.strip()
    return text


def _refusal(text: str, _asked: str) -> str:
    return "" if _REFUSAL.search(text) else text


def _leak(text: str, asked: str) -> str:
    """Without the sentences that speak of what was asked, or repeat it."""
    runs = set(_runs(_words(asked), LEAKED_WORDS))

    def leaks(sentence: str) -> bool:
        return bool(_LEAK.search(sentence)) or not runs.isdisjoint(_runs(_words(sentence), LEAKED_WORDS))

    if not leaks(text):
        return text
    return "".join(sentence for sentence in _SENTENCE.findall(text) if not leaks(sentence)).strip()


def _opener(text: str, _asked: str) -> str:
    return _capital(_OPENER.sub("", text, count=1), text)


def _capital(text: str, before: str) -> str:
    """A text that lost its beginning begins with a capital where it did."""
    return text[:1].upper() + text[1:] if text != before and before[:1].isupper() else text


def _words(text: str) -> list[str]:
    """Words in small letters; a character of Chinese, Japanese or Thai is one."""
    return re.findall(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|\w+", text.casefold())


def _runs(words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + size]) for i in range(len(words) - size + 1)] if size else []


_TABLE: dict[Rule, Callable[[str, str], str]] = {
    "thinking": _thinking,
    "fence": _fence,
    "preamble": _preamble,
    "quotes": _quotes,
    "refusal": _refusal,
    "leak": _leak,
    "opener": _opener,
}
RULES: tuple[Rule, ...] = tuple(_TABLE)
"""In this order: what surrounds an answer goes before what it says is read."""
