"""Which token comes next: drawn from the nucleus by inverting its distribution, without sorting a large vocabulary.

A row's token depends on the row alone: no path is chosen by what another row holds.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

LARGE = 4096
"""From so many tokens on, a CPU finds the nucleus by counting: sorting 30,000 floats takes it 2.6 ms, counting 0.1."""

_BINS, _ONE = 4096, 0x3F800000 >> 16
# A positive float's upper 16 bits grow with it: 128 steps to each power of two. 4096 of them go down to 2^-32.


def penalise(logits_RV: Tensor, before_RS: Tensor, penalty: float) -> Tensor:
    """Make tokens that stand in a row already less likely (Keskar et al. 2019, as in the public generators)."""
    before = logits_RV.gather(1, before_RS)
    return logits_RV.scatter(1, before_RS, torch.where(before > 0, before / penalty, before * penalty))


def nucleus(
    logits_RV: Tensor,
    draw_R: Tensor,
    top_p: float,
    top_k: int = 0,
    temperature: float = 1.0,
    reach_R1: Tensor | None = None,
    out_R: Tensor | None = None,
) -> Tensor:
    """The token of each row [R] at `draw` in [0, 1) of its nucleus, tokens in the order of falling probability.

    Args:
        top_p: the nucleus is the smallest set whose probabilities reach this; the token that reaches it is in.
        top_k: of the likeliest so many tokens only, which then count as all; 0 = no limit.
        reach_R1: `top_p` as a float64 tensor, which otherwise is made.
        out_R: where the tokens are written.
    """
    if temperature != 1.0:
        logits_RV = logits_RV / temperature
    probabilities = logits_RV.softmax(dim=1)
    if logits_RV.device.type == "cpu" and logits_RV.shape[1] >= LARGE:
        rows = zip(probabilities.numpy(), draw_R.tolist(), strict=True)
        find = _counted if not top_k else _of_top_k
        tokens = torch.tensor([find(row, draw, top_p, top_k) for row, draw in rows])
        return tokens if out_R is None else out_R.copy_(tokens)
    if reach_R1 is None:
        reach_R1 = torch.full((len(draw_R), 1), top_p, dtype=torch.double, device=draw_R.device)
    return _sorted(probabilities, draw_R, reach_R1, top_k, out_R)


def _sorted(
    probabilities_RV: Tensor, draw_R: Tensor, reach_R1: Tensor, top_k: int, out_R: Tensor | None = None
) -> Tensor:
    """`nucleus` in few kernels; where probabilities are NaN, some token."""
    probabilities, tokens = probabilities_RV.sort(dim=1, descending=True, stable=True)
    if top_k:
        probabilities = probabilities[:, :top_k]
        probabilities = probabilities / probabilities.sum(dim=1, keepdim=True)
    upto = probabilities.cumsum(dim=1, dtype=torch.double)
    last = torch.searchsorted(upto, reach_R1).clamp_(max=upto.shape[1] - 1)  # the token that reaches p is still in
    target = upto.gather(1, last).mul_(draw_R[:, None])
    index = torch.minimum(torch.searchsorted(upto, target, right=True), last)
    return torch.gather(tokens, 1, index, out=None if out_R is None else out_R[:, None]).squeeze(1)


def _of_top_k(row: np.ndarray, draw: float, top_p: float, top_k: int) -> int:
    least = np.partition(row, -top_k)[-top_k] if top_k < len(row) else 0.0
    chosen = torch.from_numpy(np.flatnonzero(row >= least))  # by rising id, so that ties stay in that order
    draws, reach = torch.tensor([[draw], [top_p]], dtype=torch.double)
    index = _sorted(torch.from_numpy(row)[None, chosen], draws, reach[None], top_k)
    return int(chosen[index])


def _counted(row: np.ndarray, draw: float, top_p: float, _top_k: int) -> int:
    """Tokens that together have less than the nucleus leaves out are not in it: mostly nearly all, which are not
    counted. Half of what it leaves out, so that rounding cannot matter."""
    likely = row >= (1 - top_p) / (2 * len(row))
    if 2 * np.count_nonzero(likely) > len(row):
        return _by_bins(row, draw, top_p)
    (tokens,) = likely.nonzero()
    return int(tokens[_by_bins(row[tokens], draw, top_p)])


def _by_bins(row: np.ndarray, draw: float, top_p: float) -> int:
    """Only two of the bins are ever sorted: where the nucleus ends, and where the draw falls."""
    bins = np.minimum(_ONE - (row.view(np.int32) >> 16), _BINS - 1)
    upto = np.bincount(bins, weights=row).cumsum()
    last = min(int(upto.searchsorted(top_p)), len(upto) - 1)
    edge, reached = _within(row, bins, last, upto)
    size = max(1, int(np.count_nonzero(reached - row[edge] < top_p)))
    target = draw * float(reached[size - 1])
    falls = min(int(upto.searchsorted(target, side="right")), last)
    members, reached = (edge[:size], reached[:size]) if falls == last else _within(row, bins, falls, upto)
    return int(members[min(int(reached.searchsorted(target, side="right")), len(members) - 1)])


def _within(row: np.ndarray, bins: np.ndarray, chosen: int, upto: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a bin, likeliest first, and what the probabilities add up to with each of them."""
    (members,) = (bins == chosen).nonzero()
    members = members[(-row[members]).argsort(kind="stable")]
    before = upto[chosen - 1] if chosen else 0.0
    return members, before + row[members].cumsum(dtype=np.float64)
