"""The figures of NLVR2, grounding and classes, by hand-made tables and slow formulas."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capfilt.errors import DataError, ModelError
from capfilt.evaluation.metrics import classification, grounding, nlvr2

# ---- NLVR2 ----


def test_nlvr2_counts_groups_of_which_all_is_right() -> None:
    labels = [True, False, True, True, None, False]
    figures = nlvr2.accuracy([True, False, False, True, True, False], labels, ["a", "a", "b", "b", "b", None])
    assert figures == {
        "statements": 5,
        "unlabelled": 1,
        "accuracy": 80.0,
        "consistency": 50.0,
        "majority": 60.0,
    }
    assert "consistency" not in nlvr2.accuracy([True], [True])
    assert nlvr2.accuracy([True], [None], ["a"]) == {"statements": 0, "unlabelled": 1}
    with pytest.raises(DataError, match="statement dev-1-0-0 of row 1 is that of row 0"):
        nlvr2.accuracy([True, True], [True, True], ids=["dev-1-0-0", "dev-1-0-0"])
    with pytest.raises(DataError, match="1 answers but 2 groups"):
        nlvr2.accuracy([True], [True], ["a", "b"])


# ---- grounding ----

SIDE = st.integers(0, 6)
BOX = st.tuples(SIDE, SIDE, st.integers(1, 6), st.integers(1, 6))


@given(BOX, BOX)
def test_iou_counts_unit_squares(box: tuple[int, ...], other: tuple[int, ...]) -> None:
    def squares(x: int, y: int, width: int, height: int) -> set[tuple[int, int]]:
        return {(i, j) for i in range(x, x + width) for j in range(y, y + height)}

    first, second = squares(*box), squares(*other)
    expected = len(first & second) / len(first | second)
    assert grounding.iou(box, other) == grounding.iou(other, box) == pytest.approx(expected)


def test_half_is_enough() -> None:
    figures = grounding.accuracy(
        [[0, 0, 2, 2], [0, 0, 2, 0.99], [9, 9, 0, 0]], [[0, 0, 2, 4], [0, 0, 2, 2], [0, 0, 1, 1]]
    )
    assert figures == {
        "phrases": 3,
        "accuracy": pytest.approx(100 / 3),
        "mean_iou": pytest.approx(100 * (0.5 + 0.495) / 3),
    }
    assert grounding.accuracy([], []) == {"phrases": 0}


def test_boxes_of_no_thought() -> None:
    wanted, sizes = [[0, 0, 8, 4], [1, 1, 2, 2]], [[8, 8], [8, 8]]
    assert grounding.whole_picture(wanted, sizes)["accuracy"] == 50.0
    random = grounding.random_box(wanted, sizes)
    assert random == grounding.random_box(wanted, sizes)
    assert 0 < random["accuracy"] < 20
    proposals = [[[0, 0, 8, 8], [0, 0, 8, 4], [7, 7, 1, 1], [0, 0, 1, 1]], []]
    chosen = grounding.random_proposal(wanted, proposals)
    assert chosen["accuracy"] == 25.0
    assert chosen["best_accuracy"] == 50.0
    assert chosen["mean_iou"] == pytest.approx(100 * (0.5 + 1 + 0 + 1 / 32) / 4 / 2)


def test_a_box_that_is_none_is_named() -> None:
    with pytest.raises(DataError, match=r"wanted box of row 1 is .*; its width and height must be above 0"):
        grounding.accuracy([[0, 0, 1, 1]] * 2, [[0, 0, 1, 1], [0, 0, 0, 1]])
    with pytest.raises(ModelError, match="predicted box of row 0"):
        grounding.accuracy([[0, np.nan, 1, 1]], [[0, 0, 1, 1]])
    with pytest.raises(DataError, match="1 boxes but 2 wanted boxes"):
        grounding.accuracy([[0, 0, 1, 1]], [[0, 0, 1, 1]] * 2)
    with pytest.raises(DataError, match=r"shape \(1, 3\)"):
        grounding.accuracy([[0, 0, 1]], [[0, 0, 1, 1]])


# ---- classes ----


def test_classes_by_hand() -> None:
    scores = np.array([[3, 2, 1], [3, 2, 1], [1, 2, 3], [0, 0, 0], [9, 0, 0]])
    figures = classification.accuracy(scores, [0, 1, 2, 2, None])
    assert figures == {
        "examples": 4,
        "unlabelled": 1,
        "top1": pytest.approx(100 * (1 + 0 + 1 + 1 / 3) / 4),
        "mean_per_class": pytest.approx(100 * (1 + 0 + (1 + 1 / 3) / 2) / 3),
        "majority": 50.0,
    }


@given(st.integers(0, 2**32 - 1), st.integers(6, 12))
def test_top5_is_a_place_among_the_first_five(seed: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.permuted(np.tile(np.arange(classes), (4, 1)), axis=1)
    labels = rng.integers(classes, size=4).tolist()
    expected = [label in np.argsort(-row)[:5] for row, label in zip(scores, labels, strict=True)]
    assert classification.accuracy(scores, labels)["top5"] == pytest.approx(100 * np.mean(expected))
    level = classification.accuracy(np.zeros((4, classes)), labels)
    assert level["top1"] == pytest.approx(100 / classes)
    assert level["top5"] == pytest.approx(500 / classes)


def test_classes_refuse_what_is_none() -> None:
    with pytest.raises(DataError, match="label of row 1 is 3; the classes are 0 to 2"):
        classification.accuracy(np.zeros((2, 3)), [0, 3])
    with pytest.raises(ModelError, match="scores of row 1 are NaN"):
        classification.accuracy([[0.0, 1.0], [np.nan, 0.0]], [0, 0])
    with pytest.raises(DataError, match=r"shape \(3,\)"):
        classification.accuracy(np.zeros(3), [0])
    assert classification.accuracy(np.zeros((1, 3)), [None]) == {"examples": 0, "unlabelled": 1}
