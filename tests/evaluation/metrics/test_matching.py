"""The filter's figures against counts of every pair and every threshold."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.errors import CapfiltError, DataError, ModelError, UsageError
from capfilt.evaluation.metrics import matching

# Few distinct values, so that ties are common.
value = st.integers(-4, 4).map(lambda n: n / 8)
rows = st.lists(st.tuples(value, st.booleans()), max_size=20)
filled = st.lists(value, min_size=1, max_size=15)


def slow_auc(right: list[float], wrong: list[float]) -> float:
    return sum((r > w) + (r == w) / 2 for r in right for w in wrong) / (len(right) * len(wrong))


@settings(deadline=None)
@given(rows)
def test_auc_counts_every_pair(pairs: list[tuple[float, bool]]) -> None:
    scores, labels = [s for s, _ in pairs], [label for _, label in pairs]
    right, wrong = [s for s, label in pairs if label], [s for s, label in pairs if not label]
    actual = matching.auc(np.array(scores), np.array(labels, bool))
    if right and wrong:
        assert actual == slow_auc(right, wrong)
    else:
        assert actual is None


@settings(deadline=None)
@given(rows, st.randoms(use_true_random=False))
def test_auc_ignores_order_and_scale_and_flips_with_the_sign(pairs, random) -> None:
    scores, labels = np.array([s for s, _ in pairs]), np.array([label for _, label in pairs], bool)
    area = matching.auc(scores, labels)
    order = random.sample(range(len(pairs)), len(pairs))
    assert matching.auc(scores[order], labels[order]) == area
    assert matching.auc(np.exp(scores) * 3 - 1, labels) == area
    if area is not None:
        assert matching.auc(-scores, labels) == pytest.approx(1 - area)


def test_auc_of_the_obvious() -> None:
    assert matching.auc([0.9, 0.8, 0.2, 0.1], [True, True, False, False]) == 1.0
    assert matching.auc([0.9, 0.8, 0.2, 0.1], [False, False, True, True]) == 0.0
    assert matching.auc([0.5] * 4, [True, False, True, False]) == 0.5
    assert matching.auc([1, 2, 3], [0, 1, 0]) == 0.5


@settings(deadline=None)
@given(rows, value)
def test_precision_and_recall_count_what_is_kept(pairs: list[tuple[float, bool]], threshold: float) -> None:
    figures = matching.precision_recall(
        np.array([s for s, _ in pairs]), np.array([label for _, label in pairs], bool), threshold
    )
    kept = [label for s, label in pairs if s >= threshold]
    right = [s >= threshold for s, label in pairs if label]
    expected = {}
    if kept:
        expected["precision"] = sum(kept) / len(kept)
    if right:
        expected["recall"] = sum(right) / len(right)
    assert figures == expected


def test_report_by_hand() -> None:
    scores = [0.9, 0.7, 0.4, 0.8, 0.3, 0.1, 0.5]
    matches = [True, True, True, False, False, False, False]
    kinds = ["right", "right", "right", "swap", "swap", "random", "random"]
    assert matching.report(scores, np.array(matches), kinds, 0.5) == {
        "threshold": 0.5,
        "auc": pytest.approx(9 / 12),
        "precision": pytest.approx(2 / 4),
        "recall": pytest.approx(2 / 3),
        "kept": pytest.approx(4 / 7),
        "auc_by_kind": {"random": pytest.approx(5 / 6), "swap": pytest.approx(4 / 6)},
    }


@settings(deadline=None)
@given(st.lists(st.tuples(value, st.booleans(), st.sampled_from(["swap", "random", "late"])), max_size=20))
def test_kinds_average_to_the_whole(rows: list[tuple[float, bool, str]]) -> None:
    scores, matches, kinds = [r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows]
    figures = matching.report(np.array(scores), np.array(matches, bool), kinds, 0.0)
    wrong = [kind for match, kind in zip(matches, kinds, strict=True) if not match]
    if "auc" not in figures:
        assert not wrong or len(wrong) == len(rows)
        assert "auc_by_kind" not in figures
        return
    areas = figures["auc_by_kind"]
    assert set(areas) == set(wrong)
    assert sum(areas[kind] for kind in wrong) / len(wrong) == pytest.approx(figures["auc"])


def test_figures_without_a_denominator_are_absent() -> None:
    assert matching.report([], [], [], 0.5) == {"threshold": 0.5}
    assert matching.report([0.2], [False], ["swap"], 0.5) == {"threshold": 0.5, "kept": 0.0}
    assert matching.report([0.9], [True], ["right"], 0.5) == {
        "threshold": 0.5,
        "kept": 1.0,
        "precision": 1.0,
        "recall": 1.0,
    }
    assert matching.auc([], []) is None


@settings(max_examples=150, deadline=None)
@given(filled, filled, st.one_of(st.floats(0.01, 1.0), st.sampled_from([0.07, 0.25, 0.5, 0.6, 0.9, 1.0])))
def test_calibration_finds_the_highest_threshold_that_keeps_enough(right, wrong, recall) -> None:
    area = slow_auc(right, wrong)
    if area <= 0.5:
        with pytest.raises(ModelError, match="cannot tell right texts from wrong ones: AUC"):
            matching.calibrate(np.array(right), np.array(wrong), recall)
        return
    actual = matching.calibrate(np.array(right), np.array(wrong), recall)

    def share(scores: list[float], threshold: float) -> float:
        return sum(s >= threshold for s in scores) / len(scores)

    assert actual.threshold == max(t for t in right if share(right, t) >= recall)
    assert share(right, np.nextafter(actual.threshold, np.inf)) < recall
    assert actual.recall == share(right, actual.threshold) >= recall
    assert actual.false_positive_rate == share(wrong, actual.threshold)
    assert actual.auc == area


def test_calibration_is_not_fooled_by_binary_fractions() -> None:
    # 0.07 * 100 is 7.000000000000001: 7 of 100 are enough, the 8th is not needed.
    actual = matching.calibrate(np.arange(100), np.full(3, -1.0), 0.07)
    assert (actual.threshold, actual.recall, actual.false_positive_rate) == (93.0, 0.07, 0.0)


def test_a_float32_threshold_keeps_the_text_it_came_from() -> None:
    right = np.random.default_rng(0).random(1000, dtype=np.float32)
    actual = matching.calibrate(right, right - np.float32(0.5), 0.9)
    assert actual.recall == 0.9 == matching.precision_recall(right, np.ones(1000, bool), actual.threshold)["recall"]


@pytest.mark.parametrize("recall", [0.0, -1.0, 1.01, 95.0, float("nan")])
def test_calibration_refuses_what_is_no_share(recall: float) -> None:
    with pytest.raises(UsageError, match="share above 0 and at most 1"):
        matching.calibrate([0.9], [0.1], recall)


def test_faulty_scores_are_refused() -> None:
    with pytest.raises(DataError, match="1 positive and 0 negative scores"):
        matching.calibrate([0.9], [], 0.9)
    with pytest.raises(ModelError, match="1 of the filter's 2 scores are NaN"):
        matching.calibrate([0.9, np.nan], [0.1], 0.9)
    with pytest.raises(DataError, match="2 scores but labels of shape"):
        matching.auc([0.9, 0.1], [True])
    with pytest.raises(DataError, match=r"shape \(1, 2\)"):
        matching.auc([[0.9, 0.1]], [[True, False]])
    with pytest.raises(DataError, match="more than true and false"):
        matching.auc([0.9, 0.1], [1, -1])
    with pytest.raises(DataError, match="1 kinds"):
        matching.report([0.9, 0.1], [True, False], ["swap"], 0.5)
    with pytest.raises(CapfiltError, match=r"AUC 0\.500"):
        matching.calibrate([0.5], [0.5], 0.9)


def test_no_warnings_on_empty_input() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert matching.report([], [], [], 0.5) == {"threshold": 0.5}
        one_kind = matching.report(np.zeros(3, np.float32), np.zeros(3, bool), ["swap"] * 3, 0.5)
        assert one_kind == {"threshold": 0.5, "kept": 0.0}
