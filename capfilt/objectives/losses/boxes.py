"""Where in an image a text is: L1 and generalised IoU of predicted boxes (X-VLM section 3.2, equation 6).

Boxes are (center x, center y, width, height) in shares of the picture, 0 to 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def box_losses(predicted_B4: Tensor, target_B4: Tensor, is_region_B: Tensor) -> tuple[Tensor, Tensor]:
    """L1, summed over the four numbers, and 1 - GIoU; each the mean over the rows that are regions (bool [B]).

    As X-VLM: rows that are whole images count for nothing, and one degenerate box among all makes GIoU 0 for all. NaN
    where no row is a region, as a mean over nothing.
    """
    with torch.autocast(predicted_B4.device.type, enabled=False):
        predicted_B4 = predicted_B4.to(torch.promote_types(predicted_B4.dtype, torch.float32))
        target_B4 = target_B4.to(predicted_B4.dtype)
        regions_B = is_region_B.to(predicted_B4.dtype)
        l1_B = F.l1_loss(predicted_B4, target_B4, reduction="none").sum(dim=1)
        corners, others = corners_of(predicted_B4), corners_of(target_B4)
        degenerate = (corners[:, 2:] < corners[:, :2]).any() | (others[:, 2:] < others[:, :2]).any()
        # Boxes are replaced and not results: the gradient of a division by nothing is NaN, whatever it is weighed by.
        whole = torch.zeros_like(corners)
        whole[:, 2:] = 1.0
        corners, others = torch.where(degenerate, whole, corners), torch.where(degenerate, whole, others)
        giou_B = 1 - generalized_iou(corners, others)
        return (l1_B * regions_B).sum() / regions_B.sum(), (giou_B * regions_B).sum() / regions_B.sum()


def corners_of(boxes_B4: Tensor) -> Tensor:
    """(center x, center y, width, height) -> (left, top, right, bottom); [B, 4]."""
    center, size = boxes_B4[:, :2], boxes_B4[:, 2:]
    return torch.cat([center - size / 2, center + size / 2], dim=1)


def iou(a_B4: Tensor, b_B4: Tensor) -> Tensor:
    """Intersection over union of boxes given by their corners, [B] in [0, 1]; 0 / 0 is NaN."""
    shared_B, union_B = _areas(a_B4, b_B4)
    return shared_B / union_B


def generalized_iou(a_B4: Tensor, b_B4: Tensor) -> Tensor:
    """IoU less the share of the smallest box around both that neither covers (arXiv 1902.09630); [B] in (-1, 1]."""
    shared_B, union_B = _areas(a_B4, b_B4)
    around_B = (torch.max(a_B4[:, 2:], b_B4[:, 2:]) - torch.min(a_B4[:, :2], b_B4[:, :2])).clamp(min=0).prod(dim=1)
    return shared_B / union_B - (around_B - union_B) / around_B


def _areas(a_B4: Tensor, b_B4: Tensor) -> tuple[Tensor, Tensor]:
    """Of what two boxes share, and of what they cover together."""
    sides = torch.min(a_B4[:, 2:], b_B4[:, 2:]) - torch.max(a_B4[:, :2], b_B4[:, :2])
    shared_B = sides.clamp(min=0).prod(dim=1)
    return shared_B, (a_B4[:, 2:] - a_B4[:, :2]).prod(dim=1) + (b_B4[:, 2:] - b_B4[:, :2]).prod(dim=1) - shared_B
