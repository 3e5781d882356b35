"""Visual dialog's figures by hand-made tables, against all orders of tied candidates, and VisDial's files."""

from __future__ import annotations

import json
from itertools import permutations
from math import log2
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capfilt.errors import DataError, ModelError
from capfilt.evaluation import result_files
from capfilt.evaluation.metrics import dialog


def test_places_by_hand() -> None:
    scores = [[0.1, 0.9, 0.5], [0.1, 0.9, 0.5], np.arange(12.0), [0.3, 0.2]]
    figures = dialog.figures(scores, [1, 0, 1, None])
    assert figures == {
        "rounds": 3,
        "without_answer": 1,
        "r@1": pytest.approx(100 / 3),
        "r@5": pytest.approx(200 / 3),
        "r@10": pytest.approx(200 / 3),
        "mean_rank": pytest.approx((1 + 3 + 11) / 3),
        "mrr": pytest.approx(100 * (1 + 1 / 3 + 1 / 11) / 3),
    }


def test_ndcg_by_hand() -> None:
    # Two candidates are relevant, so two places count: the best is second, one of no relevance is first.
    figures = dialog.figures([[3, 2, 1, 0]], [None], [[0, 1.0, 0, 0.4]])
    assert figures["ndcg"] == pytest.approx(100 * (1 / log2(3)) / (1 + 0.4 / log2(3)))
    assert dialog.figures([[1, 2, 0, 3]], [3], [[0, 0.4, 0, 1.0]])["ndcg"] == pytest.approx(100)


def test_relevance_of_nothing_is_counted_and_in_no_figure() -> None:
    relevance = [[0.0, 0.0], [1.0, 0.0], None]
    figures = dialog.figures([[1, 0]] * 3, [0, 0, 0], relevance)
    assert (figures["ndcg"], figures["dense_rounds"], figures["all_irrelevant"]) == (100.0, 1, 1)
    assert dialog.figures([[1, 0]], [None], [[0, 0]]) == {"rounds": 0, "without_answer": 1, "all_irrelevant": 1}


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from([0.0, 0.4, 1.0])), min_size=2, max_size=5), st.data())
def test_a_tie_is_worth_the_mean_over_all_orders(round_: list[tuple[int, float]], data: st.DataObject) -> None:
    right = data.draw(st.integers(0, len(round_) - 1))
    scores, relevance = [score for score, _ in round_], [value for _, value in round_]
    orders = [p for p in permutations(range(len(round_))) if [scores[i] for i in p] == sorted(scores, reverse=True)]
    strict = [dialog.figures([np.argsort(order)[::1] * -1.0], [right], [relevance]) for order in orders]
    figures = dialog.figures([scores], [right], [relevance])
    assert figures.keys() == strict[0].keys()
    for name, value in figures.items():
        assert value == pytest.approx(fmean(of_order[name] for of_order in strict)), name


def test_a_random_ranking() -> None:
    figures = dialog.random_ranking([100, 100], [0, 99], [[1.0] + [0.0] * 99, None])
    assert figures["r@1"] == pytest.approx(1.0)
    assert figures["r@10"] == pytest.approx(10.0)
    assert figures["mean_rank"] == 50.5
    assert figures["mrr"] == pytest.approx(sum(1 / place for place in range(1, 101)))
    assert figures["ndcg"] == pytest.approx(1.0)


def test_frequent_answers_after_such_questions() -> None:
    questions = ["Is it red?", "is it big", "what color", "is it so"]
    candidates = [["yes", "no"], ["no", "yes"], ["no", "red", "yes"], ["yes", "no"]]
    figures = dialog.prior(questions, candidates, [1, 0, 1, 0], [None, None, None, [1.0, 0.0]])
    assert figures["r@1"] == 75.0
    assert figures["ndcg"] == 0.0


def test_bad_rounds_are_named() -> None:
    with pytest.raises(DataError, match="row 1 has 2 candidates but 3 relevances"):
        dialog.figures([[1, 0]] * 2, [0, 0], [None, [0, 0, 1]])
    with pytest.raises(DataError, match="gt_index of row 0 is 2; its candidates are 0 to 1"):
        dialog.figures([[1, 0]], [2])
    with pytest.raises(DataError, match="relevance of row 0 is negative"):
        dialog.figures([[1, 0]], [0], [[0.5, -1]])
    with pytest.raises(ModelError, match="score of row 0 is NaN"):
        dialog.figures([[1, np.nan]], [0])
    with pytest.raises(DataError, match="row 0 have shape"):
        dialog.figures([[]], [0])
    with pytest.raises(DataError, match=r"round \(3, 1\) of row 1 is that of row 0"):
        dialog.figures([[1, 0]] * 2, [0, 0], ids=[(3, 1), (3, 1)])


def test_files_of_the_servers(tmp_path: Path) -> None:
    assert result_files.write_vqa(tmp_path / "vqa.json", [(2, "red"), (1, "2")]) == 2
    assert json.loads((tmp_path / "vqa.json").read_text()) == [
        {"question_id": 2, "answer": "red"},
        {"question_id": 1, "answer": "2"},
    ]
    assert result_files.write_visdial(tmp_path / "d.json", [(9, 1, [0.1, 0.9, 0.5, 0.5]), (9, 2, [1.0])]) == 2
    assert json.loads((tmp_path / "d.json").read_text()) == [
        {"image_id": 9, "round_id": 1, "ranks": [4, 1, 2, 3]},
        {"image_id": 9, "round_id": 2, "ranks": [1]},
    ]
    with pytest.raises(DataError, match="question 2 of row 1"):
        result_files.write_vqa(tmp_path / "vqa.json", [(2, "red"), (2, "blue")])
    with pytest.raises(DataError, match="counts them from 1"):
        result_files.write_visdial(tmp_path / "d.json", [(9, 0, [1.0])])
