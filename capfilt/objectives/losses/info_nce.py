"""Symmetric InfoNCE of a dual encoder (CLIP, arXiv 2103.00020, figure 3): every pair's negatives are all other pairs.

With several processes it matters which rows a process takes the loss of, and whether features come with the gradients
that other processes have for them. Measured on two processes, after data-parallel training has averaged gradients:

    local_loss  gather_with_grad  encoders' gradient against one process's on all pairs
    no          no                1 / processes of it (VLMo, X-VLM, open_clip's default)
    no          yes               equal
    yes         yes               equal (open_clip's large runs, and the default here)
    yes         no                of another direction: cosine 0.86

The gradient of the scale is the same in all four but the last.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from capfilt.objectives.collectives import gather, gather_with_gradient, rank, world_size


class InfoNce(NamedTuple):
    """The loss, and the scaled cosines of this process's rows against all N columns, without gradient."""

    loss: Tensor
    image_to_text_BN: Tensor
    text_to_image_BN: Tensor


def info_nce(
    image_BP: Tensor,
    text_BP: Tensor,
    scale: Tensor | float,
    local_loss: bool = True,
    gather_with_grad: bool = True,
    image_ids_B: Tensor | None = None,
) -> InfoNce:
    """L = (CE(y, scale s_i2t) + CE(y, scale s_t2i)) / 2 over unit vectors of this process's pairs, keys of all.

    Args:
        scale: what cosines are multiplied by, 1 / temperature.
        local_loss: take the loss of this process's rows, or of those of all, as every process then does.
        gather_with_grad: whether gathered features carry gradients to the processes that they are of.
        image_ids_B: equal numbers = the same image; the target is then even over all columns of the pair's image.
    """
    collect = gather_with_gradient if gather_with_grad or world_size() == 1 else gather
    images, texts = collect(image_BP), collect(text_BP)
    B, first = len(image_BP), rank() * len(image_BP)
    if not gather_with_grad and not local_loss:  # a process's own rows have their gradients in any case
        images = torch.cat([images[:first], image_BP, images[first + B :]])
        texts = torch.cat([texts[:first], text_BP, texts[first + B :]])
    mine = slice(first, first + B)
    rows = mine if local_loss else slice(None)
    # A cosine in bf16 is off by up to 0.004, and that is multiplied by a scale of up to 100.
    with torch.autocast(image_BP.device.type, enabled=False):
        image_rows, text_rows = (image_BP, text_BP) if local_loss else (images, texts)
        to_text, to_image = scale * image_rows @ texts.T, scale * text_rows @ images.T
        target = torch.arange(len(texts), device=texts.device)[rows]
        if image_ids_B is not None:
            every = gather(image_ids_B)
            same = (every[rows, None] == every[None, :]).to(to_text.dtype)
            target = same / same.sum(dim=1, keepdim=True)
        loss = (F.cross_entropy(to_text, target) + F.cross_entropy(to_image, target)) / 2
    within = slice(None) if local_loss else mine
    return InfoNce(loss, to_text[within].detach(), to_image[within].detach())
