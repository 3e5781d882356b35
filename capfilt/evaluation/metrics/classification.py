"""Classes: top-1, top-5, the mean over classes and what the most frequent class gives; visual entailment has three.

A tie is worth what a fair coin would make of it: a model that gives every class the same score earns chance, not
all pictures of class 0.

Shape suffixes: N examples, C classes.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from capfilt.errors import DataError, ModelError
from capfilt.evaluation.metrics.rows import check_columns, check_unique


def accuracy(
    scores_NC: ArrayLike, labels: Sequence[int | None], ids: Sequence[Hashable] | None = None
) -> dict[str, Any]:
    """Measure top1, top5, mean_per_class and majority in percent, and examples.

    `labels` are numbers of classes, None where it is not known: counted in unlabelled and in no other figure.
    mean_per_class is top-1 averaged over the classes that occur, so that rare ones count as much; majority is the
    top-1 of the most frequent class. top5 is absent with five classes and fewer, what has nothing to average too.

    Raises DataError when the columns differ in length, an id stands twice or a label is no class, ModelError for NaN.
    """
    scores = np.asarray(scores_NC, np.float64)
    if scores.ndim != 2:
        raise DataError(f"the scores of classes have shape {scores.shape}; they must be [examples, classes].")
    check_columns("rows of scores", len(scores), labels=labels, ids=ids)
    check_unique("example", ids)
    if np.isnan(scores).any():
        raise ModelError(f"scores of row {int(np.isnan(scores).any(1).argmax())} are NaN. Evaluate in float32.")
    classes = scores.shape[1]
    for row, label in enumerate(labels):
        if label is not None and not 0 <= label < classes:
            raise DataError(f"the label of row {row} is {label}; the classes are 0 to {classes - 1}.")
    known = np.array([label is not None for label in labels], np.bool_)
    label_N = np.array([label for label in labels if label is not None], np.int64)
    figures: dict[str, Any] = {"examples": label_N.size}
    if label_N.size < len(labels):
        figures["unlabelled"] = len(labels) - label_N.size
    if not label_N.size:
        return figures
    hit_N = _hit_chance(scores[known], label_N, 1)
    occurs = np.bincount(label_N, minlength=classes)
    hits = np.bincount(label_N, weights=hit_N, minlength=classes)
    figures["top1"] = 100.0 * float(hit_N.mean())
    if classes > 5:
        figures["top5"] = 100.0 * float(_hit_chance(scores[known], label_N, 5).mean())
    figures["mean_per_class"] = 100.0 * float((hits[occurs > 0] / occurs[occurs > 0]).mean())
    figures["majority"] = 100.0 * float(occurs.max() / label_N.size)
    return figures


def _hit_chance(scores_NC: NDArray[np.float64], label_N: NDArray[np.int64], k: int) -> NDArray[np.float64]:
    """Chance that the right class is among the first k, those of one score in random order."""
    right_N1 = np.take_along_axis(scores_NC, label_N[:, None], axis=1)
    better_N, tied_N = (scores_NC > right_N1).sum(1), (scores_NC == right_N1).sum(1)
    return np.asarray(np.clip((k - better_N) / tied_N, 0.0, 1.0), np.float64)
