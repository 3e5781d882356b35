from __future__ import annotations

from typing import Any

import pytest
import torch

from capfilt import presets
from capfilt.models import BlipConfig, read_architecture
from capfilt.pipelines.bench.floor import AnnotateLoad, MachineRate, annotate_flops, floor_figures


def load(one: Any, other: Any = None, **changes: Any) -> AnnotateLoad:
    given = {"shared_vision": False, "shared_context": False, "rows": 1, "captions": 1, "tokens": 20}
    return AnnotateLoad(one, other or one, **{**given, "scored_tokens": 16, **changes})


def test_flops_are_those_on_paper() -> None:
    """Vision: patches; in each block q, k, v, o, the two products of attention, the two of the feed-forward layer.
    Captions: keys and values of the picture, then of each token q, k, v, o twice, attention to itself and to the
    picture, feed-forward, and the vocabulary."""
    width, depth, hidden, image, tokens, words = 24, 3, 80, 17, 10, 100
    tree = {
        "vision": {"image_size": 32, "patch_size": 8, "width": width, "depth": depth, "heads": 4, "hidden": hidden},
        "text": {"vocab_size": words, "width": width, "depth": depth, "heads": 4, "hidden": hidden},
        "projection": 8,
    }
    architecture = BlipConfig.model_validate(tree)
    flops = annotate_flops(load(architecture, tokens=tokens, rows=2, captions=2))
    block = image * width * (4 * width + 2 * hidden) + 2 * image * image * width
    assert flops["vision"] == 2 * 2 * (16 * 3 * 8 * 8 * width + depth * block)
    layer = tokens * width * (6 * width + 2 * hidden) + 2 * tokens * width * (tokens + image)
    head = tokens * width * (width + words)
    assert flops["caption"] == 2 * (depth * 2 * image * width * width + 2 * (depth * layer + head))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vilt/tiny", "vlmo/tiny", "xvlm/tiny", "albef/tiny", "clip/tiny", "blip2/tiny"])
def test_every_filter_has_a_floor(model: str) -> None:
    captioner = read_architecture(presets.find("models", "blip/tiny")).for_role("captioner")
    filter_ = read_architecture(presets.find("models", model)).for_role("filter")
    assert min(annotate_flops(load(captioner, filter_)).values()) > 0


def test_the_share_is_of_the_time_that_products_need() -> None:
    rate = MachineRate(torch.device("cpu"), torch.float32, seconds=[2 * 1024**3 / 1e9])  # 1 GFLOP/s
    figures = floor_figures(rate, {"vision": 3e9, "score": 1e9}, {"vision": 6.0, "score": 1.0, "all": 16.0})
    assert figures["images_per_second"] == pytest.approx(0.25)
    assert figures["reached"] == pytest.approx({"vision": 0.5, "score": 1.0, "all": 0.25})
    assert figures["matmul_gflops"] == pytest.approx(1)


def test_the_machine_multiplies() -> None:
    rate = MachineRate(torch.device("cpu"), torch.float32)
    rate.measure(1)
    assert len(rate.seconds) == 1
    assert rate.flops > 0
