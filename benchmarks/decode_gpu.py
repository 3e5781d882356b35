"""What a step of writing captions costs on a GPU: as the model computes it, by the fused decoder, and captured.

    python benchmarks/decode_gpu.py [--batches 64 256] [--steps 20] [--out TABLE.md]

BLIP-base in bf16, one caption an image of 384 px (577 image tokens), none of which ends before the last step. A step
as the model computes it is that of `Model.decode_step` under autocast; captured ones are replayed from the third batch
on. Weights are random, so the nucleus of `nucleus` is most of the vocabulary; `narrow` has a distribution like that of
a trained model.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from capfilt.inference.config import DecodeConfig
from capfilt.inference.device import autocast
from capfilt.inference.generation.decode import generate
from capfilt.inference.generation.fused import FusedSteps
from capfilt.inference.generation.graphs import StepGraphs
from capfilt.models import Blip, BlipConfig
from capfilt.models.layers.config import TextConfig, VisionConfig
from capfilt.models.layers.image_context import ImageContext

TOKENS, VOCABULARY, END = 577, 30524, 102


def captioner() -> Blip:
    """A text decoder of BLIP-base; its vision tower is too small to cost anything."""
    text = TextConfig(
        vocab_size=VOCABULARY, width=768, depth=12, heads=12, hidden=3072, max_positions=512, roles=("decoder",)
    )
    vision = VisionConfig(image_size=16, patch_size=16, width=768, depth=1, heads=12, hidden=768)
    torch.manual_seed(0)
    model = Blip(BlipConfig(vision=vision, text=text)).eval().cuda()
    with torch.no_grad():
        model.text.head.bias[END] -= 1e4  # no text ends
    return model


def write(
    model: Blip, image: ImageContext, config: DecodeConfig, draws: Tensor, fused: FusedSteps | None = None
) -> None:
    """A batch of texts."""
    with autocast(torch.device("cuda"), torch.bfloat16):
        generate(model, image, [VOCABULARY - 2], END, config, draws, None, fused)


@torch.inference_mode()
def measure(write: Callable[[], object], steps: int, seconds: float) -> tuple[float, float]:
    """Milliseconds and kernels of a step; medians."""
    for _ in range(3):
        write()
    torch.cuda.synchronize()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        begun = time.perf_counter()
        write()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        write()
        torch.cuda.synchronize()
    kernels = sum(event.count for event in seen.key_averages() if not event.key.startswith(("Mem", "cuda")))
    return 1000 * statistics.median(times) / steps, kernels / steps


def lines(batches: list[int], steps: int, seconds: float) -> list[str]:
    """A table, a line for each method and batch."""
    model = captioner()
    found = [
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, BLIP-base, {steps} tokens, ms and kernels a step:",
        "",
        "| method | batch | model ms | fused ms | captured ms | model kernels | fused kernels | MB of graphs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    methods = {"greedy": ("greedy", 1.0), "nucleus": ("nucleus", 1.0), "narrow": ("nucleus", 0.1)}
    for batch in batches:
        shape = (batch, 12, TOKENS, 64)
        image = ImageContext(tuple(torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(24)))
        draws = torch.rand(batch, steps, device="cuda", dtype=torch.double)
        for name, (method, temperature) in methods.items():
            config = DecodeConfig(method=method, temperature=temperature, min_length=2, max_length=steps + 1, top_p=0.9)
            plain, captured = partial(write, model, image, config, draws), FusedSteps(model, StepGraphs())
            ms, kernels = measure(plain, steps, seconds)
            fused_ms, fused_kernels = measure(partial(plain, FusedSteps(model)), steps, seconds)
            before = torch.cuda.memory_reserved()
            captured_ms, _ = measure(partial(plain, captured), steps, seconds)
            memory = (torch.cuda.memory_reserved() - before) / 1e6
            found.append(
                f"| {name} | {batch} | {ms:.3f} | {fused_ms:.3f} | {captured_ms:.3f}"
                f" | {kernels:.0f} | {fused_kernels:.0f} | {memory:.0f} |"
            )
            print(found[-1], flush=True)
            del captured
            torch.cuda.empty_cache()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=1.0, help="how long each is measured")
    parser.add_argument("--out", type=Path, help="where the table is written")
    options = parser.parse_args()
    table = "\n".join(lines(options.batches, options.steps, options.seconds))
    print(table)
    if options.out:
        options.out.write_text(table + "\n")


if __name__ == "__main__":
    main()
