"""How many altered copies of photographs each kind of nearness finds, at no false alarm among the photographs.

    python benchmarks/dedup_photos.py PHOTOS [--model NAME=MODEL ...] >> benchmarks/dedup_photos_DATE.md

PHOTOS is a folder of photographs. For hashes: the recall of each alteration by radius, and how many pairs of different
photographs are within it. For vectors: the recall at the lowest cosine at which no two different photographs are near.
A model `random:ARCHITECTURE` has random weights.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from capfilt.data.images.decode import decode
from capfilt.data.images.perceptual_hash import perceptual_hash
from capfilt.inference.batches import Images
from capfilt.inference.device import Compute
from capfilt.inference.embedder import Embedder
from capfilt.models.checkpoints import store
from capfilt.models.registry import architecture_of, build
from capfilt.runs.progress import Progress
from capfilt.stages.near.embed import EmbedConfig, VectorModel

SHOWN = (0, 1, 2, 3, 4, 6, 8, 10, 12)


def jpeg(quality: int) -> Callable[[Image.Image], Image.Image]:
    def alter(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return decode(file.getvalue())

    return alter


def cropped(image: Image.Image) -> Image.Image:
    """Without a tenth of each side, taken from both of its ends."""
    x, y = image.width // 20, image.height // 20
    return image.crop((x, y, image.width - x, image.height - y))


ALTERATIONS: dict[str, Callable[[Image.Image], Image.Image]] = {
    **{f"JPEG quality {quality}": jpeg(quality) for quality in (30, 50, 70, 85, 95)},
    "resized to 50 %": lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC),
    "grey": lambda image: ImageOps.grayscale(image).convert("RGB"),
    "10 % cropped": cropped,
    "mirrored": ImageOps.mirror,
}


def hash_table(photos: list[Image.Image]) -> list[str]:
    """Recall by alteration and radius."""
    began = time.perf_counter()
    hashes = np.array([perceptual_hash(photo) for photo in photos], np.uint64)
    seconds = time.perf_counter() - began
    between = np.bitwise_count(hashes[:, None] ^ hashes)[np.triu_indices(len(photos), 1)]
    lines = [
        f"Hashing takes {1000 * seconds / len(photos):.1f} ms a decoded photograph. The two nearest of"
        f" {len(photos)} different photographs are {between.min()} bits apart.",
        "",
        "| recall within | " + " | ".join(f"{radius} bits" for radius in SHOWN) + " |",
        "|---|" + "--:|" * len(SHOWN),
    ]
    for name, alter in ALTERATIONS.items():
        copies = np.array([perceptual_hash(alter(photo)) for photo in photos], np.uint64)
        apart = np.bitwise_count(hashes ^ copies)
        lines.append(f"| {name} | " + " | ".join(f"{(apart <= radius).mean():.3f}" for radius in SHOWN) + " |")
    false = " | ".join(str(int((between <= radius).sum())) for radius in SHOWN)
    return [*lines, f"| pairs of different photographs, of {len(between):,} | {false} |"]


def vectors(embedder: Embedder, photos: list[Image.Image]) -> np.ndarray:
    """float16 as tables have them, computed with further on in float32; [N, D]."""
    form, made = embedder.image_format, []
    for start in range(0, len(photos), 50):
        pixels = [form.to_pixels(photo) for photo in photos[start : start + 50]]
        made.append(embedder.vectors(Images({form: form.preprocess.normalise(form.preprocess.stack(pixels))})))
    return np.concatenate(made).astype(np.float16).astype(np.float32)


def vector_table(photos: list[Image.Image], models: dict[str, Embedder]) -> list[str]:
    """Recall by alteration and model, each at its own cosine without a false alarm."""
    own = {name: vectors(embedder, photos) for name, embedder in models.items()}
    upper = np.triu_indices(len(photos), 1)
    highest = {name: float((made @ made.T)[upper].max()) for name, made in own.items()}
    lines = ["| recall | " + " | ".join(models) + " |", "|---|" + "--:|" * len(models)]
    lines.append("| at a cosine above | " + " | ".join(f"{highest[name]:.4f}" for name in models) + " |")
    for name, alter in ALTERATIONS.items():
        copies, cells = [alter(photo) for photo in photos], []
        for model, embedder in models.items():
            cosines = (own[model] * vectors(embedder, copies)).sum(axis=1)
            cells.append(f"{(cosines > highest[model]).mean():.3f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def opened(model: str) -> Embedder:
    """A model by name, or `random:ARCHITECTURE`."""
    if model.startswith("random:"):
        torch.manual_seed(0)
        folder = Path(tempfile.mkdtemp())
        store.save(build(architecture_of(model.removeprefix("random:"))), folder)
        model = str(folder)
    return VectorModel.find(model, Progress(quiet=True)).open(EmbedConfig(), Compute(device="cpu", precision="fp32"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--model", action="append", default=[], metavar="NAME=MODEL")
    given = parser.parse_args()
    files = sorted(path for path in given.photos.rglob("*") if path.suffix in (".jpg", ".jpeg", ".png"))
    photos = [decode(path.read_bytes()) for path in files]
    print("\n".join(hash_table(photos)))
    if given.model:
        named = dict(word.split("=", 1) for word in given.model)
        print("", *vector_table(photos, {name: opened(model) for name, model in named.items()}), sep="\n")


if __name__ == "__main__":
    main()
