"""Tables of what attention adds for the offset between two tokens, brought to grids of another size.

As BEiT, VLMo and X-VLM do: the known offsets stand at distances that grow geometrically up to those of the new grid, so
that near ones stay as they are, and a cubic spline goes through them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def offset_index(side: int, device: torch.device | None = None) -> Tensor:
    """For each two tokens of a grid of `side` x `side` the row of a table of offsets, query - key; [M, M]."""
    place = torch.arange(side, device=device)
    row, column = (axis.flatten() for axis in torch.meshgrid(place, place, indexing="ij"))
    return (row[:, None] - row + side - 1) * (2 * side - 1) + column[:, None] - column + side - 1


def resize_offsets(table_RC: Tensor, side: int) -> Tensor:
    """A table of (2 s - 1)^2 offsets, one column a head, -> the same of a grid of `side` x `side` tokens."""
    old, new = round(len(table_RC) ** 0.5), 2 * side - 1
    if old == new:
        return table_RC
    known = torch.tensor(_geometric(old // 2, new // 2), dtype=torch.float64)
    weights = _spline(torch.cat([-known.flip(0), known.new_zeros(1), known]), torch.arange(new).double() - new // 2)
    grid = table_RC.double().view(old, old, -1)
    return torch.einsum("ai,bj,ijc->abc", weights, weights, grid).flatten(0, 1).to(table_RC.dtype)


def _geometric(count: int, reach: int) -> list[float]:
    """`count` distances, each step q times the one before; q in [1.01, 1.5] is that by which they reach `reach`."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (1 - q**count) / (1 - q) > reach else (q, high)
    return [sum(q**i for i in range(n + 1)) for n in range(count)]


def _spline(known_K: Tensor, wanted_W: Tensor) -> Tensor:
    """Weights [W, K] of values at `known_K` for those at `wanted_W`: the cubic spline through all of them, without a
    knot at the second and the second last; beyond the ends it stays. Of less than four values the line."""
    if len(known_K) == 1:
        return torch.ones(len(wanted_W), 1, dtype=known_K.dtype)
    degree = 3 if len(known_K) > 3 else 1
    inner = known_K[2:-2] if degree == 3 else known_K[1:-1]
    ends = [known_K[end].expand(degree + 1) for end in (0, -1)]
    knots = torch.cat([ends[0], inner, ends[1]])
    wanted_W = wanted_W.clamp(float(known_K[0]), float(known_K[-1]))
    return _basis(knots, degree, wanted_W) @ torch.linalg.inv(_basis(knots, degree, known_K))


def _basis(knots: Tensor, degree: int, x_W: Tensor) -> Tensor:
    """The B-splines of these knots at x, [W, K] (Cox and de Boor)."""
    x = x_W[:, None]
    last = (x == knots[-1]) & (knots[1:] == knots[-1]) & (knots[:-1] < knots[-1])
    values = (((knots[:-1] <= x) & (x < knots[1:])) | last).double()
    for k in range(1, degree + 1):
        left, right = knots[k:-1] - knots[: -k - 1], knots[k + 1 :] - knots[1:-k]
        up = torch.where(left > 0, (x - knots[: -k - 1]) / left.where(left > 0, 1), 0) * values[:, :-1]
        values = up + torch.where(right > 0, (knots[k + 1 :] - x) / right.where(right > 0, 1), 0) * values[:, 1:]
    return values
