"""VQA's figures by hand-made tables; the accuracy of one answer is tested in tests/data/text/test_answers.py."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capfilt.errors import DataError
from capfilt.evaluation.metrics import vqa

REFERENCES = [
    ["yes"] * 10,
    ["no"] * 8 + ["yes"] * 2,
    ["two"] * 3 + ["3"] * 7,
    ["red"] * 10,
    [],
]
TYPES = ["is", "is", "how many", None, "is"]


def test_accuracy_overall_and_by_type() -> None:
    figures = vqa.accuracy(
        ["yes", "yes", "2", "blue", "yes"], REFERENCES, TYPES, ["yes/no", "yes/no", "number", "other", "yes/no"]
    )
    assert figures == {
        "questions": 4,
        "without_answers": 1,
        "accuracy": pytest.approx(100 * (1 + 0.6 + 0.9 + 0) / 4),
        "by_question_type": {"how many": pytest.approx(90.0), "is": pytest.approx(80.0)},
        "by_answer_type": {"number": pytest.approx(90.0), "other": 0.0, "yes/no": pytest.approx(80.0)},
    }


def test_what_has_nothing_to_average_is_absent() -> None:
    assert vqa.accuracy([], []) == {"questions": 0}
    assert vqa.accuracy(["yes"], [[]], [None]) == {"questions": 0, "without_answers": 1}
    assert vqa.best_constants([[]], ["is"]) == {}


def test_the_best_constants() -> None:
    figures = vqa.best_constants(REFERENCES, TYPES)
    assert figures["majority_answer"] == "yes"
    assert figures["majority"] == pytest.approx(100 * (1 + 0.6) / 4)
    assert figures["prior_by_question_type"] == pytest.approx(100 * (1.6 + 1 + 1) / 4)
    assert "prior_by_question_type" not in vqa.best_constants(REFERENCES)


ANSWER = st.sampled_from(["yes", "Yes.", "no", "2", "two", "the"])


@given(st.lists(st.lists(ANSWER, min_size=4, max_size=10), min_size=1, max_size=6), ANSWER)
def test_no_constant_is_better_than_the_best(references: list[list[str]], answer: str) -> None:
    best = vqa.best_constants(references, ["is"] * len(references))
    accuracy = vqa.accuracy([best["majority_answer"]] * len(references), references)["accuracy"]
    assert best["majority"] == pytest.approx(accuracy) == pytest.approx(best["prior_by_question_type"])
    assert vqa.accuracy([answer] * len(references), references)["accuracy"] <= accuracy + 1e-9


def test_bad_rows_are_named() -> None:
    with pytest.raises(DataError, match="2 answers but 1 references"):
        vqa.accuracy(["yes", "no"], [["yes"]])
    with pytest.raises(DataError, match="question 7 of row 2 is that of row 0 too"):
        vqa.accuracy(["yes"] * 3, [["yes"]] * 3, ids=[7, "7", 7])
