"""Grad-CAM: which patches of an image the ITM logit of a text rests on (arXiv 1610.02391, as ALBEF and X-VLM use it).

Only models whose text attends to a grid of image tokens have such a map; `check_heatmap` refuses all others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from capfilt.errors import UsageError
from capfilt.inference.filters.fusion import FusionFilter
from capfilt.inference.local_model import LocalModel
from capfilt.models import Architecture, Model
from capfilt.models.layers.attention import explicit_weights


def check_heatmap(model: object, architecture: Architecture, layer: int | None = None) -> int:
    """The layer that a heatmap is of: `layer`, or the architecture's own. UsageError for a model that has no heatmap,
    or for a layer that does not attend to images; `model` is how a person knows it."""
    layers = architecture.fusion_layers
    if not layers:
        raise UsageError(
            f"{model} has no heatmap: it is of the family {architecture.family}, and no layer of it lets a text attend "
            "to a grid of patches and gives itm. Filters of blip, albef and xvlm have one."
        )
    if layer is not None and layer not in layers:
        raise UsageError(f"layer {layer} of {model} does not attend to images; allowed are {layers[0]} to {layers[-1]}")
    return architecture.heatmap_layer if layer is None else layer


def heatmaps(
    local: LocalModel, pixels_13SS: Tensor, texts: Sequence[str], max_length: int = 35, layer: int | None = None
) -> np.ndarray:
    """The heatmap of each text on one picture, float32 [texts, grid, grid] in [0, 1]; row 0 is the top of the picture.

    The largest value of a text is 1; all are 0 where no attention speaks for "matches".

    Args:
        local: a model that fuses, in eval mode.
        pixels_13SS: the picture as the model reads it, normalised.
        texts: cleaned and cut as the filter does it before it scores them.
        max_length: tokens of a text at most.
        layer: one of the architecture's `fusion_layers`; None: its `heatmap_layer`.

    Raises:
        UsageError: a model without heatmaps, or a layer that does not attend to images.
    """
    layer = check_heatmap("the model", local.model.config, layer)
    ids_BT, lengths = FusionFilter(local, max_length).token_ids([local.tokenizer.clean(text) for text in texts])
    places, ends = torch.arange(ids_BT.shape[1]), torch.tensor(lengths)[:, None]
    words_BT = (places > 0) & (places < ends - int(local.tokenizer.closed))
    mask_BT = (places < ends).to(ids_BT.device)
    with torch.no_grad():
        tokens_1ND = local.model.encode_image(pixels_13SS)
    maps = grad_cam(local.model, tokens_1ND, (ids_BT, mask_BT), words_BT.to(ids_BT.device), layer)
    return np.asarray((maps / maps.amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)).cpu())


def grad_cam(model: Model, tokens_1ND: Tensor, texts: tuple[Tensor, Tensor], words_BT: Tensor, layer: int) -> Tensor:
    """Attention weights of one layer times what of their gradient speaks for "matches": fp32 [B, grid, grid], >= 0.

    The mean over heads and over the positions where `words_BT` is True. In the last layer, and for a text without any
    word, it is the row of the first token, which alone decides there. `texts` are ids and mask, each [B, T], of texts
    beside the one image whose tokens these are; token 0, [CLS], is left out of the map.
    """
    ids_BT, mask_BT = texts
    first_BT = torch.zeros_like(words_BT)
    first_BT[:, 0] = True
    with torch.enable_grad():
        image = model.image_context(tokens_1ND, "encoder")
        with explicit_weights(model.image_attention(layer)) as kept:
            logits = model.match(model.fuse(ids_BT, mask_BT, image))
        (gradient,) = torch.autograd.grad(logits[:, 1].sum(), kept)
    B, T = ids_BT.shape
    cam = (kept[0].detach().float() * gradient.float().relu()).mean(dim=1).view(B, T, -1)[..., 1:]
    alone = torch.full_like(words_BT, layer == model.config.fusion_layers[-1]) | ~words_BT.any(dim=1, keepdim=True)
    rows_BT1 = torch.where(alone, first_BT, words_BT)[..., None].float()
    side = math.isqrt(cam.shape[-1])
    return ((cam * rows_BT1).sum(dim=1) / rows_BT1.sum(dim=1)).view(B, side, side)
