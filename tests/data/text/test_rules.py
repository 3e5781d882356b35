"""Rules about a text alone."""

from __future__ import annotations

import builtins
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from capfilt.data.text import rules
from capfilt.data.text.rules import TextRules, digits_share, repetition
from capfilt.errors import RecipeError

STRICT: dict[str, Any] = {
    "min_words": 3,
    "max_words": 8,
    "min_characters": 6,
    "max_repetition": 0.2,
    "max_digits_share": 0.4,
    "no_urls": True,
    "no_boilerplate": True,
}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a dog on the beach", ""),
        ("a dog", "fewer than 3 words"),
        ("a b c", "fewer than 6 characters"),
        (" a b c ", "fewer than 6 characters"),  # space around a text is none of it
        ("one two three four five six seven eight nine", "more than 8 words"),
        ("dog Dog DOG on beach", "words repeat"),  # 2 of 5
        ("a dog a beach today", ""),  # 1 of 5: 0.2 is allowed
        ("lot 2019 48291 77", "too many digits"),
        ("a dog http://x.example/1 beach", "web address"),
        ("find it at pets.com today", "web address"),
        ("a dog, 3.5 metres long", ""),
        ("Click to enlarge picture", "boilerplate"),
        ("a dog on the beach - stock photo", "boilerplate"),
        ("a dog on the beach, stock photos.", "boilerplate"),
        ("embedded image permalink of it", "boilerplate"),
        ("profile photo of someone", "boilerplate"),
        ("stock photos of a dog", ""),  # at the beginning it may say what is on it
        ("a photo of stock cars", ""),
    ],
)
def test_the_rule_that_a_text_breaks(text: str, reason: str) -> None:
    assert TextRules(**STRICT).broken(text) == reason


@pytest.mark.parametrize("text", ["IMG_0042", "DSC01234", "1920x1080", "red-shoe.jpg", "untitled", "image 3", "photo"])
def test_file_names_and_sizes_alone_are_boilerplate(text: str) -> None:
    assert TextRules(no_boilerplate=True).broken(text) == "boilerplate"
    assert TextRules(no_boilerplate=True).broken(f"a dog beside {text} of it") == ""


TEXTS = st.text(st.sampled_from("ab1 .\n\tÄ漢٣/:-"), max_size=40) | st.text(max_size=40)


@given(TEXTS)
def test_no_rule_is_broken_where_none_is_set(text: str) -> None:
    assert TextRules().broken(text) == ""


@given(TEXTS, st.sampled_from(sorted(STRICT)))
def test_a_rule_alone_agrees_with_all_of_them(text: str, name: str) -> None:
    """What breaks one rule breaks the rules together, and what keeps each keeps all."""
    alone = TextRules(**{name: STRICT[name]}).broken(text)
    together = TextRules(**STRICT).broken(text)
    if alone:
        assert together
    elif together:
        assert any(TextRules(**{each: STRICT[each]}).broken(text) == together for each in STRICT)
    assert TextRules(**STRICT).broken(f"  {text}\n") == together, "space around a text changes nothing"


@given(st.lists(st.sampled_from(["a", "A", "dog", "漢"]), max_size=12), st.randoms(use_true_random=False))
def test_repetition_is_a_share_that_no_order_changes(words: list[str], random: Any) -> None:
    share = repetition(words)
    assert 0 <= share < 1
    assert repetition(random.sample(words, len(words))) == share
    assert repetition(words * 2) >= share
    assert (share == 0) == (len({word.lower() for word in words}) == len(words))


@given(TEXTS)
def test_the_share_of_digits(text: str) -> None:
    assert 0 <= digits_share(text) <= 1
    assert digits_share(f" {text} ") == digits_share(text)
    assert digits_share(text + "1") >= digits_share(text)


def test_a_text_that_is_clearly_of_another_language_is_dropped() -> None:
    english = TextRules(languages="en")
    assert english.languages == ("en",)
    assert english.broken("un chat noir sur la table") == "not in en"
    assert english.broken("a black cat lies on the table") == ""
    assert english.broken("a cat") == "", "two words say little: py3langid takes this one for Galician, at 0.09"
    assert TextRules(languages=["en", "fr"]).broken("un chat noir sur la table") == ""
    english.check()
    with pytest.raises(RecipeError, match=r"rules.languages has 'eng'.*There are: ace, af, "):
        TextRules(languages=["eng"]).check()


def test_without_the_library_only_languages_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "find_spec", lambda name: None)
    TextRules(**STRICT).check()
    with pytest.raises(RecipeError, match=r"needs py3langid: pip install 'capfilt\[language\]'"):
        TextRules(languages=["en"]).check()


def test_the_library_is_imported_where_a_language_is_asked_for_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def imported(name: str, *more: Any) -> Any:
        assert "langid" not in name
        return real(name, *more)

    real = builtins.__import__
    for module in [name for name in sys.modules if "py3langid" in name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", imported)
    assert TextRules(**STRICT).broken("a dog on the beach") == ""


@pytest.mark.parametrize("fields", [{"min_words": -1}, {"max_repetition": 1.0}, {"languages": [1]}, {"max_urls": 1}])
def test_rules_that_mean_nothing_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TextRules(**fields)
