"""Whether `capfilt estimate` says the truth: estimates from a sample, and the whole, which is done beside each of them.

    OMP_NUM_THREADS=1 python benchmarks/estimate.py --photos ../shared/photos --seeds 10

Both sets are cleaned in this process by two BLIPs with random weights: an embedded world of 1,000 pictures in 40
shards, of which an estimate reads 32 (its sample is clustered by shard), and 200 photographs in shards of 20, of which
it reads all. Before each estimate and after it the whole is timed anew; what it keeps is the same each time. Seconds
are those of this process's CPU, for the estimate and for the whole: on a shared machine those of the wall say how much
others did.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import capfilt
from capfilt.config import build
from capfilt.data import shards
from capfilt.data.sample import Sample
from capfilt.data.synthetic import world
from capfilt.data.synthetic.world import WorldConfig
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.models import Blip, BlipConfig
from capfilt.models.checkpoints import store
from capfilt.models.layers.config import TextConfig, VisionConfig

SHAPE = {"depth": 3, "heads": 2, "hidden": 128, "init_std": 0.3}
SETTINGS = {"decode.max_length": 20}
SETS = {"world": ("1,000 pictures of 32 px in 40 shards", 300), "photographs": ("200 of COCO in 10 shards", 100)}
"""What each is, and how many samples an estimate draws."""


def make_models(folder: Path, image_size: int) -> dict[str, Path]:
    """A captioner and a filter with random weights."""
    tokenizer = Tokenizer.load("world")
    for seed, (role, part) in enumerate({"captioner": "decoder", "filter": "encoder"}.items()):
        torch.manual_seed(seed)
        vision = VisionConfig(image_size=image_size, patch_size=16, width=64, **SHAPE)
        sizes = {"vocab_size": len(tokenizer), "width": 64, "max_positions": 64, "dropout": 0.0}
        text = TextConfig(**sizes, **SHAPE, roles=(part,))
        store.save(Blip(BlipConfig(vision=vision, text=text, projection=16)).eval(), folder / role)
        tokenizer.save(folder / role)
    return {"captioner": folder / "captioner", "filter": folder / "filter"}


def make_photographs(photos: Path, folder: Path) -> None:
    """Shards of 20 photographs, every second one with another picture's caption."""
    record = json.loads((photos / "captions.json").read_text())
    texts = {note["image_id"]: note["caption"] for note in record["annotations"]}
    images = sorted(record["images"], key=lambda image: image["file_name"])
    samples = [
        Sample(f"{i:06d}", (photos / "images" / one["file_name"]).read_bytes(), "jpg", texts[other["id"]], {})
        for i, one in enumerate(images)
        for other in [images[(i + i % 2) % len(images)]]
    ]
    for start in range(0, len(samples), 20):
        shards.write(folder / f"{start // 20:05d}.tar", samples[start : start + 20])


def whole(data: Path, models: dict[str, Path], out: Path) -> Any:
    """All of the data, annotated and selected."""
    annotated = capfilt.annotate(data, **models, out=out / "a", settings=SETTINGS, address="local")
    return capfilt.select(data, annotations=annotated, out=out / "clean", address="local")


def timed(data: Path, models: dict[str, Path], out: Path) -> tuple[float, float]:
    """The share of pictures that the whole keeps, and its seconds."""
    began = time.monotonic()
    done = whole(data, models, out)
    return done.samples.kept / done.samples.num_in, time.monotonic() - began


def compare(name: str, data: Path, models: dict[str, Path], seeds: int, scratch: Path) -> None:
    """One line a seed: the estimate beside the truth."""
    what, size = SETS[name]
    print(f"\n## {name}: {what}; {size} drawn\n")
    print("| seed | kept, estimated | kept | seconds, estimated | seconds | ratio |\n|---|---|---|---|---|---|")
    timed(data, models, scratch / name / "warm")
    _, before = timed(data, models, scratch / name / "before")
    held = near = 0
    for seed in range(seeds):
        out = scratch / name / str(seed)
        options: Any = {**models, "settings": SETTINGS, "address": "local"}
        figures = capfilt.estimate(data, out=out / "e", sample=size, seed=seed, **options).figures
        kept, hours = figures["kept_images"], figures["hours"]["value"]
        truth, after = timed(data, models, out)
        seconds, before = (before + after) / 2, after
        ratio, is_held = hours * 3600 / seconds, kept["low"] <= truth <= kept["high"]
        held, near = held + is_held, near + (abs(ratio - 1) <= 0.2)
        ends = f"{kept['value']:.1%} ({kept['low']:.1%} to {kept['high']:.1%})"
        mark = "" if is_held else " (outside)"
        print(f"| {seed} | {ends} | {truth:.1%}{mark} | {hours * 3600:.1f} | {seconds:.1f} | {ratio:.2f} |", flush=True)
    print(f"\n{held} of {seeds} keep rates lie within their intervals, {near} of {seeds} times within 20 %.")


def main() -> None:
    """Both sets, all seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path, help="a folder with captions.json and images/")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu", help="what is measured, for both")
    given = parser.parse_args()
    if given.clock == "cpu":  # of this process, which does all of the work
        time.monotonic = time.perf_counter = time.process_time
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        config = build(WorldConfig, ["web=1000", "shard_size=25"])
        world.write(config, 0, scratch, "web")
        compare("world", scratch / "web", make_models(scratch / "small", 32), given.seeds, scratch)
        if given.photos is not None:
            make_photographs(given.photos, scratch / "photos")
            compare("photographs", scratch / "photos", make_models(scratch / "large", 64), given.seeds, scratch)


if __name__ == "__main__":
    main()
