"""What the losses of a step draw at random, each draw by its name: from torch's generator, or given from outside.

A task asks its `draws` for every draw of its losses, so that losses and gradients can be compared with those of other
code on the same negatives, masks or patches: `task.draws = GivenDraws(wrong_images=..., wrong_texts=...)`. Dropout is
no such draw; set its rates to 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Draws:
    """Draws from torch's generator, which the training loop seeds by (seed, step, rank)."""

    def take(self, name: str, draw: Callable[[], T]) -> T:
        """What is drawn under this name: the result of `draw`, which draws it."""
        return draw()

    def columns(self, name: str, weights_BN: Tensor) -> Tensor:
        """One column for each row, [B] indices; the weights of a row need not sum to 1."""
        return self.take(name, lambda: one_of_each_row(weights_BN))


def one_of_each_row(weights_BN: Tensor) -> Tensor:
    """One column for each row by its weights, [B]: what torch.multinomial draws, by its own way on a CPU, but without
    its look at the weights, for which the host waits twice.

    A row without any weight above 0 is an error, which a GPU tells when the host next waits for it. From NaN or
    infinity some column is drawn: the loss is not finite either, and the step is left out (`TrainConfig.skips`).
    """
    drawn_BN = weights_BN / torch.empty_like(weights_BN).exponential_()
    best = drawn_BN.masked_fill(weights_BN == 0, -1.0).max(dim=1)  # for the least of weights become 0 here
    torch._assert_async((best.values != -1).all(), "a draw by weights of which a row has none above 0")
    return best.indices


class GivenDraws(Draws):
    """Gives out what was given, and keeps in `weights` what would have been drawn from, both by name."""

    def __init__(self, **given: Any):
        self.given = given
        self.weights: dict[str, Tensor] = {}

    def take(self, name: str, draw: Callable[[], T]) -> T:
        """What was given under this name, at every step. LookupError where nothing was."""
        if name not in self.given:
            raise LookupError(f"nothing is given for the draw {name}; given are: {', '.join(self.given) or 'none'}")
        return self.given[name]

    def columns(self, name: str, weights_BN: Tensor) -> Tensor:
        """The columns that were given under this name. ValueError for what cannot have been drawn."""
        self.weights[name] = weights_BN
        columns = super().columns(name, weights_BN)
        rows, most = weights_BN.shape
        if columns.shape != (rows,) or not bool(((columns >= 0) & (columns < most)).all()):
            raise ValueError(f"the draw {name} takes {rows} columns from 0 to {most - 1}, and given are {columns}")
        return columns
