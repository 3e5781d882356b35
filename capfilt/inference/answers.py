"""What models for downstream tasks say of texts about pictures: the class of each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from capfilt.inference.local_model import LocalModel

MAX_LENGTH = 50
"""Tokens of a text that is answered, where the model has as many positions."""


@torch.no_grad()
def classify(local: LocalModel, pixels: Tensor, texts: Sequence[str], picture: Sequence[int]) -> Tensor:
    """How likely each class of a classifier is, [R, labels], for R texts; names are `local.model.config.labels`.

    Args:
        pixels: pictures [B, 3, S, S] as the model reads them; of a model of two pictures [2 B, 3, S, S], the left ones
            first.
        picture: the number of each text's picture among the B.
    """
    tokens = local.model.encode_image(pixels)
    chosen, ids, mask = encoded(local, texts, picture, len(pixels))
    return local.model.classify(tokens[chosen], ids, mask).float().softmax(dim=1)


def encoded(
    local: LocalModel, texts: Sequence[str], picture: Sequence[int], pictures: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of image tokens of each text, its ids and its mask; of a model of two pictures the rows of all left ones
    come first."""
    length = min(MAX_LENGTH, local.model.config.max_positions)
    ids, mask = local.tokenizer.encode([local.tokenizer.clean(text) for text in texts], length)
    rows = torch.tensor(picture, device=local.device)
    sides = local.model.config.pictures_of_text
    rows = torch.cat([rows + side * (pictures // sides) for side in range(sides)])
    return rows, torch.from_numpy(ids).to(local.device), torch.from_numpy(mask).to(local.device)
