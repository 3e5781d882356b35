"""Box losses against areas that are counted on a grid, and by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from capfilt.objectives.losses.boxes import box_losses, corners_of, generalized_iou, iou

GRID = 20


def boxes(*corners: tuple[int, int, int, int]) -> Tensor:
    """Boxes by their corners on the grid, as (center, size) in shares of it."""
    left, top, right, bottom = torch.tensor(corners, dtype=torch.float64).T / GRID
    return torch.stack([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top], dim=1)


def cells(corners: Tensor) -> set[tuple[int, int]]:
    left, top, right, bottom = (corners * GRID).round().int().tolist()
    return {(x, y) for x in range(left, right) for y in range(top, bottom)}


PAIRS = [
    ((0, 0, 10, 10), (0, 0, 10, 10)),
    ((0, 0, 10, 10), (5, 5, 15, 20)),
    ((0, 0, 4, 4), (10, 12, 20, 20)),
    ((2, 2, 18, 18), (5, 6, 7, 9)),
    ((0, 0, 5, 5), (5, 0, 10, 5)),
]


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_iou_and_giou_count_cells(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> None:
    first, second = corners_of(boxes(a)), corners_of(boxes(b))
    one, other = cells(first[0]), cells(second[0])
    around = cells(torch.cat([torch.min(first, second)[0, :2], torch.max(first, second)[0, 2:]]))
    expected = len(one & other) / len(one | other)
    assert iou(first, second).item() == pytest.approx(expected)
    expected -= (len(around) - len(one | other)) / len(around)
    assert generalized_iou(first, second).item() == pytest.approx(expected)


def test_whole_images_count_for_nothing() -> None:
    predicted = boxes((0, 0, 10, 10), (0, 0, 4, 4), (1, 1, 3, 3)).requires_grad_()
    target = boxes((5, 5, 15, 20), (10, 12, 20, 20), (0, 0, 20, 20))
    l1, giou = box_losses(predicted, target, torch.tensor([True, True, False]))
    of_rows = [box_losses(predicted[i : i + 1], target[i : i + 1], torch.tensor([True])) for i in range(2)]
    assert l1.item() == pytest.approx(sum(row[0].item() for row in of_rows) / 2)
    assert giou.item() == pytest.approx(sum(row[1].item() for row in of_rows) / 2)
    (l1 + giou).backward()
    assert predicted.grad is not None
    assert not predicted.grad[2].any()


def test_a_degenerate_box_leaves_l1_alone() -> None:
    predicted = torch.tensor([[0.5, 0.5, -0.2, 0.2], [0.5, 0.5, 0.2, 0.2]], requires_grad=True)
    target = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.4, 0.5, 0.2, 0.2]])
    l1, giou = box_losses(predicted, target, torch.tensor([True, True]))
    assert giou.item() == 0
    assert l1.item() == pytest.approx((0.4 + 0.1) / 2)
    (l1 + giou).backward()
    assert predicted.grad is not None
    assert bool(predicted.grad.isfinite().all())
