"""Captured steps on a real GPU: the texts of the model's own steps, no wait of the host in them, few kernels, and what
happens where memory runs out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from capfilt.errors import is_out_of_memory
from capfilt.inference.config import DecodeConfig
from capfilt.inference.generation import beam, decode
from capfilt.inference.generation.beam import scored_beams
from capfilt.inference.generation.decode import generate
from capfilt.inference.generation.fused import FusedSteps
from capfilt.inference.generation.graphs import CudaCapture, StepGraphs
from capfilt.models import Blip
from capfilt.models.layers.image_context import ImageContext

SEP, IMAGES = 3, 48
MakeBlip = Callable[..., Blip]


@pytest.fixture(scope="module")
def on_cpu(small_blip: MakeBlip) -> Blip:
    model = small_blip(roles=("decoder",), width=64, hidden=128)
    with torch.no_grad():
        model.text.head.bias[SEP] += 2  # texts of many lengths
    return model


@pytest.fixture
def model(real_gpu: torch.device, on_cpu: Blip) -> Blip:
    return on_cpu.to(real_gpu)


def context(model: Blip, images: int, seed: int = 0) -> ImageContext:
    tokens = 3 * torch.randn(images, 9, 24, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        return model.image_context(tokens.cuda(), "decoder")


def write(model: Blip, image: ImageContext, config: DecodeConfig, texts: int, fused: FusedSteps | None) -> list[Any]:
    prompt = [model.config.text.dec, 40]
    if config.method == "beam":
        return [beam.ids for beam in scored_beams(model, image, prompt, SEP, config, texts, None, fused)]
    steps = config.max_length - len(prompt)
    draws = torch.rand(image.rows * texts, steps, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    return generate(model, image, prompt, SEP, config, draws.cuda(), None, fused)


def settings(**options: Any) -> DecodeConfig:
    return DecodeConfig.model_validate({"min_length": 4, "max_length": 26, **options})


@pytest.mark.parametrize(
    ("config", "texts"),
    [
        (settings(method="greedy"), 1),
        (settings(), 3),
        (settings(repetition_penalty=1.4, top_k=9), 2),
        (settings(method="beam", beams=4), 2),
        (settings(method="beam", accounting="original"), 3),
    ],
    ids=["greedy", "nucleus", "penalty", "beam", "original"],
)
def test_captured_steps_write_what_the_model_writes(model: Blip, config: DecodeConfig, texts: int) -> None:
    """In fp32 up to ties, which 2 % of the texts may meet, in batches that replay what earlier ones captured."""
    fused = FusedSteps(model, StepGraphs())
    for seed, images in enumerate((IMAGES, IMAGES, IMAGES, 7, 7, IMAGES)):
        image = context(model, images, seed)
        wanted = write(model, image, config, texts, None)
        found = write(model, image, config, texts, fused)
        assert sum(a != b for a, b in zip(found, wanted, strict=True)) <= 0.02 * len(wanted) + 1
    assert sum(graph is not None for graph in fused.graphs._graphs.values()) > 20
    assert write(model, image, config, texts, fused) == found, "a replay is what was replayed"


def test_bf16_is_computed_without_casts(model: Blip) -> None:
    with torch.autocast("cuda", torch.bfloat16):
        fused, image = FusedSteps(model, StepGraphs()), context(model, IMAGES)
        texts = [write(model, image, settings(method="greedy"), 1, fused) for _ in range(3)]
        wanted = write(model, image, settings(method="greedy"), 1, None)
    assert texts[0] == texts[2]
    assert sum(a == b for a, b in zip(texts[0], wanted, strict=True)) > 0.6 * IMAGES, "rounding moves some of them"
    assert fused.decoder("cuda").dtype == torch.float32
    assert set(fused._decoders) == {torch.bfloat16, torch.float32}


@pytest.mark.parametrize("method", ["greedy", "nucleus", "beam"])
def test_no_step_makes_the_host_wait(model: Blip, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """torch itself refuses a wait within a step, captured or not; ends are looked for after every eighth."""
    fused, image = FusedSteps(model, StepGraphs()), context(model, IMAGES)
    config = settings(method=method)
    run = fused.graphs.run

    def strict(key: Any, step: Callable[[], None]) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(key, step)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    write(model, image, config, 1, fused)
    monkeypatch.setattr(fused.graphs, "run", strict)
    for _ in range(3):
        write(model, image, config, 1, fused)


def test_a_step_that_finds_no_memory_for_its_graph_goes_on_without(
    model: Blip, caplog: pytest.LogCaptureFixture
) -> None:
    class Full(CudaCapture):
        def __call__(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
            def too_large() -> None:
                step()
                torch.empty(1 << 50, dtype=torch.uint8, device="cuda")

            return super().__call__(too_large)

    image, config = context(model, IMAGES), settings(method="greedy")
    wanted = write(model, image, config, 1, None)
    fused = FusedSteps(model, StepGraphs(Full))
    assert [write(model, image, config, 1, fused) for _ in range(3)] == [wanted] * 3
    assert "no memory for CUDA graphs" in caplog.text
    assert fused.graphs.full
    whole = FusedSteps(model, StepGraphs())  # and others can still capture
    assert [write(model, image, config, 1, whole) for _ in range(3)] == [wanted] * 3


def test_where_memory_runs_out_all_is_let_go(model: Blip) -> None:
    fused, image = FusedSteps(model, StepGraphs()), context(model, IMAGES)
    config = settings(method="greedy")
    wanted, *_ = (write(model, image, config, 1, fused) for _ in range(3))
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    with pytest.raises(RuntimeError) as caught, fused.runner(image):
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
    assert is_out_of_memory(caught.value)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < held
    assert [write(model, image, config, 1, fused) for _ in range(3)] == [wanted] * 3


def test_texts_leave_in_few_sizes(model: Blip, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second round of other images needs hardly any new graph."""
    fused = FusedSteps(model, StepGraphs())
    for module in (decode, beam):
        monkeypatch.setattr(module, "is_poll_step", lambda _device, step: step % 4 == 3)
    for seed in range(6):
        write(model, context(model, IMAGES, seed), settings(), 1, fused)
    rows = {key[1][2] for key in fused.graphs._graphs}
    assert rows <= {4, 6, 8, 12, 16, 24, 32, 48}
    assert min(rows) < IMAGES
