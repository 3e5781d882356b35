"""Word-patch alignment: how cheaply the words of a text are transported to the patches of an image (ViLT section 3.2).

The plan is found by IPOT (arXiv 1802.04307), proximal steps of which each is one scaling of rows and columns, as in
UNITER; 50 of them come within 3e-5 of the optimum on small problems. Gradients flow through the costs alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BETA, STEPS = 0.5, 50
"""How far a proximal step may go, and how many there are (ViLT)."""


def transport_cost(text_BMD: Tensor, image_BND: Tensor, words_BM: Tensor, patches_BN: Tensor) -> Tensor:
    """<T, 1 - cos> of the optimal plan T from words to patches, both weighted evenly; [B], fp32 at least.

    `words_BM` and `patches_BN` are True where there is one; [CLS], [SEP] and padding are none. 0 for a pair without
    any word or any patch.
    """
    with torch.autocast(text_BMD.device.type, enabled=False):
        dtype = torch.promote_types(text_BMD.dtype, torch.float32)
        text = F.normalize(text_BMD.to(dtype), dim=-1, eps=1e-5)
        image = F.normalize(image_BND.to(dtype), dim=-1, eps=1e-5)
        pairs_BMN = words_BM[:, :, None] & patches_BN[:, None, :]
        costs_BMN = (1 - text @ image.transpose(1, 2)).masked_fill(~pairs_BMN, 0.0)
        plan_BMN = transport_plan(costs_BMN.detach(), words_BM, patches_BN)
        return (costs_BMN * plan_BMN).sum(dim=(1, 2))


@torch.no_grad()
def transport_plan(costs_BMN: Tensor, words_BM: Tensor, patches_BN: Tensor) -> Tensor:
    """The plan of IPOT: rows sum to 1 / words and columns to 1 / patches, [B, M, N]."""
    pairs_BMN = (words_BM[:, :, None] & patches_BN[:, None, :]).to(costs_BMN.dtype)
    kernel_BMN = torch.exp(-costs_BMN / BETA) * pairs_BMN
    words_B11 = words_BM.sum(dim=1).clamp(min=1).to(costs_BMN.dtype)[:, None, None]
    patches_B11 = patches_BN.sum(dim=1).clamp(min=1).to(costs_BMN.dtype)[:, None, None]
    plan_BMN = pairs_BMN
    rows_BM1 = (words_BM.to(costs_BMN.dtype) / words_B11[:, 0])[:, :, None]
    for _ in range(STEPS):
        step_BMN = kernel_BMN * plan_BMN
        columns_B1N = _inverse(patches_B11 * (rows_BM1 * step_BMN).sum(dim=1, keepdim=True))
        rows_BM1 = _inverse(words_B11 * (step_BMN * columns_B1N).sum(dim=2, keepdim=True))
        plan_BMN = rows_BM1 * step_BMN * columns_B1N
    return plan_BMN


def wpa(costs_B: Tensor, matches_B: Tensor) -> Tensor:
    """Mean over pairs of the transport cost, with a minus where they do not match: right pairs are drawn together and
    wrong ones apart. ViLT weighs it 0.1."""
    return torch.where(matches_B, costs_B, -costs_B).mean()


def _inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 where there is nothing."""
    return torch.where(x > 0, 1 / x.clamp(min=torch.finfo(x.dtype).tiny), torch.zeros_like(x))
