"""The filter's quality: whether its scores tell right texts from wrong ones, and what a threshold keeps.

A text is kept when score >= threshold: BLIP drops what its ITM head calls unmatched, and the head calls 0.5 a
match.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from capfilt.errors import DataError, ModelError, UsageError

Figures = dict[str, float | dict[str, float]]


@dataclass(frozen=True)
class Calibration:
    """A threshold for one filter and what it does to the texts it was chosen on; shares in [0, 1]."""

    threshold: float
    recall: float
    """Share of the positives kept: at least what was asked for, more where scores tie."""
    false_positive_rate: float
    """Share of the negatives kept."""
    auc: float


def auc(scores: ArrayLike, labels: ArrayLike) -> float | None:
    """Chance that a right text outscores a wrong one, ties counting half: the exact area under the ROC curve.

    This is Mann-Whitney's U over the number of pairs, counted in whole numbers. `labels` is true for right
    texts. None when either class is empty. Raises DataError when the lengths differ, ModelError when a score
    is NaN.
    """
    values, right = _scores_and_labels(scores, labels)
    return _auc(values[right], values[~right])


def precision_recall(scores: ArrayLike, labels: ArrayLike, threshold: float) -> dict[str, float]:
    """Measure precision (share of kept texts that are right) and recall (share of right texts kept).

    Both lie in [0, 1]. Precision is absent when nothing is kept, recall when nothing is right. Raises
    as `auc` does.
    """
    values, right = _scores_and_labels(scores, labels)
    kept = values >= threshold
    kept_right, num_kept, num_right = int((kept & right).sum()), int(kept.sum()), int(right.sum())
    figures = {}
    if num_kept:
        figures["precision"] = kept_right / num_kept
    if num_right:
        figures["recall"] = kept_right / num_right
    return figures


def report(scores: ArrayLike, matches: ArrayLike, kinds: Sequence[str], threshold: float) -> Figures:
    """Measure a filter where the truth is known: threshold, auc, precision, recall, kept and auc_by_kind.

    `matches` is true for right texts; `kinds` names, for each wrong one, how it is wrong (the kinds of right
    ones are not read). kept is the share of all texts kept. auc_by_kind sets all right texts against the
    wrong ones of one kind: a filter that only tells dogs from cars looks good on average. Undefined figures
    are absent. Raises as `auc` does.
    """
    values, right = _scores_and_labels(scores, matches)
    if len(kinds) != values.size:
        raise DataError(f"{values.size} scores but {len(kinds)} kinds; there must be one kind a score.")
    figures: Figures = {"threshold": float(threshold), **precision_recall(values, right, threshold)}
    if values.size:
        figures["kept"] = float(np.mean(values >= threshold))
    overall = _auc(values[right], values[~right])
    if overall is not None:
        figures["auc"] = overall
        figures["auc_by_kind"] = _auc_by_kind(values, right, np.asarray(kinds, dtype=object))
    return figures


def calibrate(positives: ArrayLike, negatives: ArrayLike, recall: float) -> Calibration:
    """Choose the highest threshold that keeps at least `recall` (a share, 0 < recall <= 1) of the positives.

    The threshold is the score of a positive, so it holds exactly for score >= threshold in the precision the
    scores came in. Raises UsageError for another recall, DataError when either side is empty, and ModelError
    when the AUC is at most 0.5: such a filter would keep wrong texts as gladly as right ones, whatever the
    threshold.
    """
    if not 0.0 < recall <= 1.0:
        raise UsageError(f"recall is {recall}; it must be a share above 0 and at most 1, such as 0.95.")
    right, wrong = _finite(positives), _finite(negatives)
    area = _auc(right, wrong)
    if area is None:
        raise DataError(
            f"{right.size} positive and {wrong.size} negative scores to calibrate on; both are needed. "
            "Set aside more human pairs for calibration."
        )
    if area <= 0.5:
        raise ModelError(
            f"the filter cannot tell right texts from wrong ones: AUC {area:.3f} on {right.size} right and "
            f"{wrong.size} wrong texts, where 0.5 is guessing. Train the filter longer, or use another one."
        )
    # Compared as k / n >= recall: ceil(recall * n) may keep one too many (0.07 * 100 is 7.000000000000001).
    needed = np.searchsorted(np.arange(1, right.size + 1) / right.size, recall)
    threshold = np.sort(right)[::-1][needed]
    return Calibration(
        threshold=float(threshold),
        recall=float(np.mean(right >= threshold)),
        false_positive_rate=float(np.mean(wrong >= threshold)),
        auc=area,
    )


def _auc(right: NDArray[np.float64], wrong: NDArray[np.float64]) -> float | None:
    if right.size == 0 or wrong.size == 0:
        return None
    ladder = np.sort(wrong)
    # Below plus not-above counts every win twice and every tie once.
    twice_won = np.searchsorted(ladder, right, "left").sum() + np.searchsorted(ladder, right, "right").sum()
    return int(twice_won) / (2 * right.size * wrong.size)


def _auc_by_kind(values: NDArray[np.float64], right: NDArray[np.bool_], kinds: NDArray[np.object_]) -> dict[str, float]:
    areas = {}
    for kind in sorted(set(kinds[~right])):
        area = _auc(values[right], values[~right & (kinds == kind)])
        assert area is not None  # the kind is that of a wrong text, and the caller has right ones
        areas[kind] = area
    return areas


def _scores_and_labels(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    values, right = _finite(scores), np.asarray(labels)
    if right.shape != values.shape:
        raise DataError(f"{values.size} scores but labels of shape {right.shape}; there must be one label a score.")
    if right.size and not np.isin(right, (0, 1)).all():
        raise DataError("labels hold more than true and false; give true for a right text, false for a wrong one.")
    return values, right.astype(np.bool_)


def _finite(scores: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1:
        raise DataError(f"the filter's scores have shape {values.shape}; a list of one score a text is needed.")
    if np.isnan(values).any():
        raise ModelError(
            f"{np.count_nonzero(np.isnan(values))} of the filter's {values.size} scores are NaN; "
            "a NaN is on no side of a threshold. Check the checkpoint, or leave failed rows out."
        )
    return values
