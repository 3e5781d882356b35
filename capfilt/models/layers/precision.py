"""Number formats in which losses and unit vectors are taken: fp32, whatever a model computes in, and float64 for a
model in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` as it is in float64, and in fp32 whatever else it is: half precision is too coarse for a softmax over
    similarities, and integers are counts."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit(x_BP: Tensor) -> Tensor:
    """Rows of length 1, in fp32 under autocast too, float64 in float64."""
    return F.normalize(at_least_fp32(x_BP), dim=-1)
