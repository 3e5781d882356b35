"""When two texts count as equal."""

from __future__ import annotations

import pytest

from capfilt.data.text.equality import normalised, num_words


@pytest.mark.parametrize(
    ("text", "wanted", "words"),
    [
        ("A dog, on a SOFA!", "a dog on a sofa", 5),
        ("a  dog\non a\tsofa", "a dog on a sofa", 5),
        ("Straße № 5", "strasse no 5", 3),
        ("ﬁne\u00a0art", "fine art", 2),
        ("don't", "don t", 2),
        ("नमस्ते दुनिया", "नमस्ते दुनिया", 2),
        ("狗在沙发上", "狗在沙发上", 1),
        ("... !", "", 0),
    ],
)
def test_case_punctuation_spacing_and_compatibility_forms_do_not_count(text: str, wanted: str, words: int) -> None:
    assert (normalised(text), num_words(normalised(text))) == (wanted, words)
    assert normalised(normalised(text)) == wanted
