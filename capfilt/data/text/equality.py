"""When two texts count as equal: compatibility forms (NFKC), case, punctuation and spacing do not tell them apart.

A short text is equal to many by chance, so `num_words` of the normalised text decides whether equality says anything.
Scripts that put no space between words have one word a text and so never say anything.
"""

from __future__ import annotations

import unicodedata


def normalised(text: str) -> str:
    """The letters and digits of a text, in compatibility form and case-folded, with a space wherever others stood."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(c if unicodedata.category(c)[0] in "LNM" else " " for c in folded).split())


def num_words(normalised_text: str) -> int:
    return normalised_text.count(" ") + bool(normalised_text)
