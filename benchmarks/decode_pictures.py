"""Decoding JPEGs: Pillow by threads, beside nvJPEG through torchvision where a GPU is; and how far apart pixels are.

    python benchmarks/decode_pictures.py --size 384
    python benchmarks/decode_pictures.py --photos FOLDER

A picture is decoded and squashed to the size that a model reads, as `annotate` does it. The GPU's pictures are squashed
by torch's antialiased bicubic filter on the device, and beside it by Pillow, so that what the decoder alone changes is
seen apart. nvJPEG reads JPEGs alone and turns nothing by EXIF: whoever used it would keep Pillow for all else. Without
a GPU the first table is the whole answer. Takes at most 40 s.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from capfilt.cpus import available
from capfilt.data.images import decode
from capfilt.data.images.preprocess import ImageFormat
from capfilt.pipelines.bench.made_up import photo

SECONDS = 2.5
"""How long each way is measured, after one round that is not counted."""
THREADS = (1, 2, 4, 8, 16)


def photos(folder: Path | None, count: int, width: int) -> list[bytes]:
    """JPEGs of a folder, again and again; or made-up ones with the grain of photographs."""
    if folder is not None:
        found = [path.read_bytes() for path in sorted(folder.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg")]
        if not found:
            sys.exit(f"{folder} has no JPEG")
        return [found[i % len(found)] for i in range(count)]
    return [photo(width, np.random.default_rng(i)) for i in range(count)]


def rate(work: Callable[[], object], pictures: int) -> float:
    """Pictures a second: the median over rounds of `work`, which is given so many."""
    work()
    took, end = [], time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        begun = time.perf_counter()
        work()
        took.append(time.perf_counter() - begun)
    return pictures / statistics.median(took)


def on_cpu(encoded: Sequence[bytes], form: ImageFormat) -> dict[int, float]:
    """Pictures a second of Pillow, by threads."""
    found = {}
    for threads in THREADS:
        with ThreadPoolExecutor(threads) as pool:
            found[threads] = rate(
                lambda pool=pool: list(pool.map(lambda data: form.to_pixels(decode.decode(data)), encoded)),
                len(encoded),
            )
    return found


def on_gpu(encoded: Sequence[bytes], form: ImageFormat) -> dict[str, Any]:
    """Pictures a second of nvJPEG, alone and with resizing on the device, and how far its pixels are from Pillow's."""
    from torchvision.io import ImageReadMode, decode_jpeg

    files = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in encoded]

    def decoded() -> list[Tensor]:
        made: list[Tensor] = decode_jpeg(files, mode=ImageReadMode.RGB, device="cuda")
        return made

    def squashed() -> Tensor:
        return torch.stack([_squash(picture, form.size) for picture in decoded()])

    def timed(work: Callable[[], object]) -> float:
        def whole() -> None:
            work()
            torch.cuda.synchronize()

        return rate(whole, len(encoded))

    few = slice(0, min(32, len(encoded)))
    ours = [np.asarray(decode.decode(data)) for data in encoded[few]]
    theirs = [picture.permute(1, 2, 0).cpu().numpy() for picture in decoded()[few]]
    resized = [form.to_pixels(Image.fromarray(picture)) for picture in ours]
    by_pillow = [form.to_pixels(Image.fromarray(picture)) for picture in theirs]
    by_torch = list(squashed()[few].permute(0, 2, 3, 1).cpu().numpy())
    return {
        "decoded": timed(decoded),
        "decoded and resized on the device": timed(squashed),
        "levels apart": {
            "as decoded": _apart(ours, theirs),
            "resized by Pillow": _apart(resized, by_pillow),
            "resized on the device": _apart(resized, by_torch),
        },
        "gpu": torch.cuda.get_device_name(),
    }


def _squash(picture_3HW: Tensor, size: int) -> Tensor:
    floats = picture_3HW[None].float()
    made = torch.nn.functional.interpolate(floats, (size, size), mode="bicubic", antialias=True, align_corners=False)
    return made[0].round().clamp(0, 255).byte()


def _apart(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> dict[str, float]:
    """How far values of 0 to 255 differ: on average, at most, and the share that differs at all."""
    apart = np.concatenate([np.abs(a.astype(int) - b.astype(int)).ravel() for a, b in zip(ours, theirs, strict=True)])
    return {"mean": float(apart.mean()), "most": float(apart.max()), "share": float((apart > 0).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=384, help="pixels at the side of what a model reads")
    parser.add_argument("--width", type=int, default=640, help="of the made-up photographs")
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument("--photos", type=Path, help="a folder of JPEGs, in place of made-up ones")
    given = parser.parse_args()
    torch.set_num_threads(1)
    encoded, form = photos(given.photos, given.count, given.width), ImageFormat(given.size)
    found: dict[str, Any] = {"pillow pictures/s by threads": on_cpu(encoded, form)}
    if torch.cuda.is_available():
        without = importlib.util.find_spec("torchvision") is None
        found["nvjpeg pictures/s"] = "not measured: torchvision is not here" if without else on_gpu(encoded, form)
    kilobytes = round(sum(map(len, encoded)) / len(encoded) / 1000)
    about = {"cpus": available(), "kB a picture": kilobytes, "machine": platform.machine(), "torch": torch.__version__}
    print(json.dumps({**vars(given), **about, **found}, indent=1, default=str))


if __name__ == "__main__":
    main()
