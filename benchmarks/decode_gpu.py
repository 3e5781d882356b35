"""What a step of writing captions costs on a GPU: as the model computes it, and captured; BLIP-base in bf16.

    python benchmarks/decode_gpu.py [--batches 64 256] [--steps 20] [--out TABLE.md]

One caption an image of 384 px (577 image tokens), none of which ends before the last step. A step as the model
computes it is that of `Model.decode_step` under autocast; captured ones are replayed from the third batch on. Weights
are random, so the nucleus of `nucleus` is most of the vocabulary; `narrow` has a distribution like a trained model's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from capfilt.inference.config import DecodeConfig
from capfilt.inference.device import autocast
from capfilt.inference.generation.decode import generate
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
        "| method | batch | model ms | captured ms | times | model kernels | captured kernels | graphs' memory MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    methods = {"greedy": ("greedy", 1.0), "nucleus": ("nucleus", 1.0), "narrow": ("nucleus", 0.02)}
    for batch in batches:
        shape = (batch, 12, TOKENS, 64)
        image = ImageContext(tuple(torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(24)))
        draws = torch.rand(batch, steps, device="cuda", dtype=torch.double)
        for name, (method, temperature) in methods.items():
            config = DecodeConfig(method=method, temperature=temperature, min_length=2, max_length=steps + 1, top_p=0.9)
            graphs = StepGraphs(model)

            def write(graphs: StepGraphs | None, image=image, draws=draws, config=config) -> None:
                with autocast(torch.device("cuda"), torch.bfloat16):
                    generate(model, image, [VOCABULARY - 2], END, config, draws, None, graphs)

            plain = measure(lambda: write(None), steps, seconds)
            before = torch.cuda.memory_reserved()
            fast = measure(lambda: write(graphs), steps, seconds)
            memory = (torch.cuda.memory_reserved() - before) / 1e6
            found.append(
                f"| {name} | {batch} | {plain[0]:.3f} | {fast[0]:.3f} | {plain[0] / fast[0]:.2f}"
                f" | {plain[1]:.0f} | {fast[1]:.0f} | {memory:.0f} |"
            )
            print(found[-1], flush=True)
            del graphs
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
