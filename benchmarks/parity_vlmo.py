"""VLMo's image path beside transformers' BEiT and ViT, random weights: how far apart they are (docs/parity.md).

    python benchmarks/parity_vlmo.py

The same comparisons are tests in tests/models/vlmo/; this prints what they measure.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import transformers

from capfilt.models import architecture_of, build
from capfilt.models.checkpoints.initial_weights import initialise
from capfilt.models.vlmo.config import VlmoConfig
from capfilt.models.vlmo.model import Vlmo

LIMIT = 1e-5
SHAPES = ((32, 8, 64, 4, 2, 256), (96, 16, 96, 12, 3, 384))
"""image_size, patch_size, width, depth, heads, hidden."""


def theirs(absolute: bool, shape: tuple[int, ...]) -> Any:
    """A ViT, or a BEiT with relative positions and layer scale."""
    size, patch, width, depth, heads, hidden = shape
    common = {
        "image_size": size,
        "patch_size": patch,
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": hidden,
        "layer_norm_eps": 1e-6,
    }
    if absolute:
        model: Any = transformers.ViTModel(transformers.ViTConfig(**common), add_pooling_layer=False)
    else:
        more = {"use_relative_position_bias": True, "layer_scale_init_value": 0.1, "use_mean_pooling": False}
        model = transformers.BeitModel(transformers.BeitConfig(**common, **more), add_pooling_layer=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def ours(absolute: bool, shape: tuple[int, ...], folder: str) -> Vlmo:
    """A VLMo whose image experts begin as the model in a folder of transformers."""
    names = ("image_size", "patch_size", "width", "depth", "heads", "hidden")
    changes: dict[str, Any] = dict(zip(names, shape, strict=True)) | {"relative_positions": not absolute}
    config = architecture_of("vlmo/tiny").changed(layer_scale=None if absolute else 0.1, **changes)
    model = build(VlmoConfig.model_validate(config.model_dump()))
    initialise(model, vision=folder)
    assert isinstance(model, Vlmo)
    with torch.no_grad():
        model.modality.weight[1] = 0  # what VLMo adds to every image token, and the others do not have
    return model.eval()


def main() -> None:
    """Print a table; an error where the limit is passed."""
    print("| class | largest value | largest difference |\n|---|---|---|")
    for absolute in (False, True):
        worst = most = 0.0
        for shape in SHAPES:
            torch.manual_seed(0)
            model, pictures = theirs(absolute, shape), torch.randn(2, 3, shape[0], shape[0])
            with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                model.save_pretrained(folder)
                expected = model(pictures).last_hidden_state
                here = ours(absolute, shape, folder)
                states, _ = here.run(here.encode_image(pictures), "image", 0)
                worst = max(worst, float((states - expected).abs().max()))
                most = max(most, float(expected.abs().max()))
        print(f"| {type(model).__name__} | {most:.1f} | {worst:.1e} |")
        assert worst <= LIMIT, worst


if __name__ == "__main__":
    main()
