"""Grounding: how well a box fits the one that a phrase means, and what boxes of no thought reach.

Boxes are [x, y, width, height] in pixels, as docs/shards.md has them, and continuous: REFER's own script counts
pixels and differs only where an overlap is less than 1 pixel wide or high.

Shape suffixes: N phrases, P proposals.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from capfilt.errors import DataError, ModelError
from capfilt.evaluation.metrics.rows import check_columns, check_unique

ENOUGH = 0.5
"""The IoU from which on a box is right, itself included."""
_DRAWS = 1000

Boxes = NDArray[np.float64]


def iou(boxes_N4: ArrayLike, others_N4: ArrayLike) -> NDArray[np.float64]:
    """Intersection over union of boxes row by row, in [0, 1]; leading shapes broadcast. A box of no area has 0.

    Raises DataError for arrays that are no boxes.
    """
    first, second = _boxes(boxes_N4, "boxes"), _boxes(others_N4, "boxes")
    start = np.maximum(first[..., :2], second[..., :2])
    stop = np.minimum(first[..., :2] + first[..., 2:], second[..., :2] + second[..., 2:])
    shared: NDArray[np.float64] = np.clip(stop - start, 0.0, None).prod(-1)
    joint: NDArray[np.float64] = _area(first) + _area(second) - shared
    return np.asarray(np.divide(shared, joint, out=np.zeros_like(joint), where=joint > 0), np.float64)


def accuracy(boxes_N4: ArrayLike, wanted_N4: ArrayLike, ids: Sequence[Hashable] | None = None) -> dict[str, Any]:
    """Measure accuracy (IoU of 0.5 and more) and mean_iou, in percent, and phrases, one a row.

    A predicted box may have no area (it earns 0), a wanted one may not. With no phrases, no figure but the count.
    Raises DataError when shapes differ, an id stands twice or a wanted box is none, ModelError for NaN.
    """
    given, wanted = _boxes(boxes_N4, "predicted boxes"), _wanted(wanted_N4)
    check_columns("boxes", len(given), wanted_boxes=wanted, ids=ids)
    check_unique("region", ids)
    if np.isnan(given).any():
        row = int(np.isnan(given).any(-1).argmax())
        raise ModelError(f"the predicted box of row {row} is {given[row]}; a NaN is no place. Evaluate in float32.")
    return _expected([np.array([fit]) for fit in iou(given, wanted)])


def whole_picture(wanted_N4: ArrayLike, sizes_N2: ArrayLike) -> dict[str, Any]:
    """The figures to beat of a box around all of the picture, whose (width, height) are given. Raises as accuracy."""
    sizes = np.asarray(sizes_N2, np.float64).reshape(-1, 2)
    return accuracy(np.concatenate([np.zeros_like(sizes), sizes], axis=1), wanted_N4)


def random_box(wanted_N4: ArrayLike, sizes_N2: ArrayLike) -> dict[str, Any]:
    """The figures to beat of a box between two random points of the picture: the mean of 1,000 draws a phrase, the
    same ones each time. Raises as accuracy."""
    wanted, sizes = _wanted(wanted_N4), np.asarray(sizes_N2, np.float64).reshape(-1, 2)
    check_columns("boxes", len(wanted), sizes=sizes)
    points = np.random.default_rng(0).random((_DRAWS, 2, 2))
    unit = np.concatenate([points.min(1), np.abs(points[:, 0] - points[:, 1])], axis=1)
    fits = [iou(unit * np.tile(size, 2), box) for box, size in zip(wanted, sizes, strict=True)]
    return _expected(fits)


def random_proposal(wanted_N4: ArrayLike, proposals: Sequence[ArrayLike]) -> dict[str, Any]:
    """What choosing among each phrase's proposals [P, 4] can give: accuracy and mean_iou of a random one, to be beaten,
    and best_accuracy of the one that fits best, which no choice exceeds. A phrase without proposals earns 0.

    Raises as accuracy.
    """
    wanted = _wanted(wanted_N4)
    check_columns("boxes", len(wanted), proposals=proposals)
    fits = [
        iou(_boxes(of_phrase, "proposals"), box) if np.size(of_phrase) else np.zeros(1)
        for of_phrase, box in zip(proposals, wanted, strict=True)
    ]
    figures = _expected(fits)
    if fits:
        figures["best_accuracy"] = 100.0 * float(np.mean([fit.max() >= ENOUGH for fit in fits]))
    return figures


def _expected(fits: Sequence[NDArray[np.float64]]) -> dict[str, Any]:
    """The figures of one box a phrase, drawn from those whose IoUs are given."""
    figures: dict[str, Any] = {"phrases": len(fits)}
    if fits:
        figures["accuracy"] = 100.0 * float(np.mean([np.mean(fit >= ENOUGH) for fit in fits]))
        figures["mean_iou"] = 100.0 * float(np.mean([np.mean(fit) for fit in fits]))
    return figures


def _area(boxes: Boxes) -> NDArray[np.float64]:
    area: NDArray[np.float64] = np.clip(boxes[..., 2:], 0.0, None).prod(-1)
    return area


def _wanted(boxes_N4: ArrayLike) -> Boxes:
    wanted = _boxes(boxes_N4, "wanted boxes")
    bad = ~(np.isfinite(wanted).all(-1) & (wanted[..., 2:] > 0).all(-1))
    if bad.any():
        row = int(np.atleast_1d(bad).argmax())
        raise DataError(f"the wanted box of row {row} is {wanted[row]}; its width and height must be above 0.")
    return wanted


def _boxes(boxes: ArrayLike, what: str) -> Boxes:
    values = np.asarray(boxes, np.float64)
    if values.size == 0:
        return values.reshape(*values.shape[:-1], 4) if values.shape[-1:] == (4,) else np.zeros((0, 4))
    if values.shape[-1:] != (4,):
        raise DataError(f"{what} have shape {values.shape}; they must be [..., 4]: x, y, width, height.")
    return values
