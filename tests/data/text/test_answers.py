"""VQAv2's answers: its table of normalisation, and its accuracy against the rule written out."""

from __future__ import annotations

from itertools import combinations
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capfilt.data.text import answers


@pytest.mark.parametrize(
    ("answer", "normalised"),
    [
        ("Yes.", "yes"),
        ("  a red\tbus\n", "red bus"),
        ("The Dog", "dog"),
        ("none", "0"),
        ("Ten of the ten", "10 of 10"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("wouldntve", "wouldntve"),
        ("wouldnt've", "wouldn't've"),
        ("twas", "'twas"),
        ("somebody'd", "somebodyd"),
        ("let's", "let's"),
        ("hell", "hell"),
        ("3.5", "3.5"),
        ("U.S.", "us"),
        ("5.", "5"),
        ("1,000", "1000"),
        ("1,000 red-blue", "1000 redblue"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("red, blue", "red blue"),
        ("wi-fi", "wi fi"),
        ("yes!", "yes"),
        ("dog's", "dog's"),
        ("a", ""),
        (40 * ".", 8 * "."),
    ],
)
def test_normalise(answer: str, normalised: str) -> None:
    assert answers.normalise(answer) == normalised


@pytest.mark.parametrize(("same", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_ten_annotators(same: int, score: float) -> None:
    references = ["red"] * same + [f"other {number}" for number in range(10 - same)]
    assert answers.soft_accuracy("red", references) == pytest.approx(score)


def test_only_where_annotators_disagree_is_anything_normalised() -> None:
    assert answers.soft_accuracy("Yes.", ["yes"] * 10) == 0.0
    assert answers.soft_accuracy("yes\n", ["yes\t"] * 10) == 1.0
    assert answers.soft_accuracy("Yes.", ["yes"] * 9 + ["no"]) == 1.0
    # Disagreement in spelling alone, and two as a digit: both sides are normalised, as since 2021-03.
    assert answers.soft_accuracy("2", ["two"] * 5 + ["2"] * 5) == 1.0


def test_few_annotators_can_be_agreed_with_wholly() -> None:
    assert answers.soft_accuracy("red", []) is None
    assert answers.soft_accuracy("red", ["red"]) == 1.0
    assert answers.soft_accuracy("red", ["blue"]) == 0.0
    assert answers.soft_accuracy("red", ["red", "red", "red"]) == 1.0
    assert answers.soft_accuracy("red", ["red", "blue"]) == 0.5


@given(st.lists(st.sampled_from(["red", "Red.", "the blue", "blue", "two", "2"]), min_size=4, max_size=11))
def test_the_rule_written_out(references: list[str]) -> None:
    agreed = len(set(references)) == 1
    wanted = references if agreed else [answers.normalise(text) for text in references]
    targets = answers.soft_targets(references)
    for answer in {*references, "green"}:
        given_ = answer if agreed else answers.normalise(answer)
        subsets = combinations(wanted, len(wanted) - 1)
        expected = fmean(min(subset.count(given_) / 3, 1.0) for subset in subsets)
        assert answers.soft_accuracy(answer, references) == pytest.approx(expected)
        if not agreed:
            assert targets.get(answers.normalise(answer), 0.0) == pytest.approx(expected)
