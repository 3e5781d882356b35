"""What a training's batches cost the host: CPU milliseconds an image of each thread that has a part in them.

    python benchmarks/loader.py --size 224 --decoders 2
    python benchmarks/loader.py --size 384 --batch 64 --decoders 16 --device cuda

`MainThread` is the thread that computes: what it spends between asking for a batch and having the tensors of a step on
the device is all of it that is on the training's critical path. The others run beside it. `pairs/s` is the loader
alone, with nothing computed. `operators/s` is how many small operators a thread starts, as a step does, alone and while
the loader runs as fast as it can: threads that decode hold Python's lock now and then. JPEGs of 640 x 480 with the
grain of photographs, BLIP's augmentation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from capfilt.data.images.augment import AugmentConfig
from capfilt.data.loading.config import LoaderConfig, Source
from capfilt.data.loading.loader import Loader
from capfilt.objectives.interface import PairBatch
from capfilt.pipelines.bench.made_up import made_up_words, make_shard

WORDS = 30524


def spent() -> Any:
    """CPU seconds of each thread of this process that Python knows, by its name without its number."""
    seconds: Any = Counter()
    for thread in threading.enumerate():
        assert thread.ident is not None
        seconds[thread.name.split("_")[0]] += time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
    return seconds


def measure(loader: Loader, device: torch.device, batch: int, steps: int, rounds: int) -> dict[str, object]:
    """Medians over rounds of `steps` batches."""
    batches = loader.batches()
    list(islice(batches, 2))
    rates, found = [], []
    for _ in range(rounds):
        before, begun = spent(), time.perf_counter()
        for one in islice(batches, steps):
            PairBatch(one.images, one.ids, one.mask, one.image_ids).to(device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        rates.append(steps * batch / (time.perf_counter() - begun))
        found.append(spent() - before)
    batches.close()  # type: ignore[attr-defined]
    threads = sorted({name for each in found for name in each})
    each_image = 1000 / (steps * batch)
    by_thread = {name: round(statistics.median(each[name] for each in found) * each_image, 4) for name in threads}
    return {"pairs/s": round(statistics.median(rates), 1), "CPU ms an image by thread": by_thread}


def operators(device: torch.device, seconds: float = 2.0) -> float:
    """Small operators that this thread starts in a second."""
    x, done, end = torch.ones(8, device=device), 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(100):
            x.mul_(1.0)
        if device.type == "cuda":
            torch.cuda.synchronize()
        done += 100
    return done / seconds


def beside(loader: Loader, device: torch.device, batch: int) -> dict[str, float]:
    """Operators a second alone, and beside the loader at its fastest."""
    alone, taken, stop = operators(device), [0], threading.Event()

    def take() -> None:
        batches = loader.batches()
        for _ in batches:
            taken[0] += batch
            if stop.is_set():
                return batches.close()  # type: ignore[attr-defined, no-any-return]

    thread = threading.Thread(target=take)
    thread.start()
    time.sleep(2)
    before = taken[0]
    with_loader = operators(device, 4.0)
    pairs = (taken[0] - before) / 4.0
    stop.set()
    thread.join()
    return {"alone": round(alone), "beside the loader": round(with_loader), "pairs/s": pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--decoders", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(given.device)
    with tempfile.TemporaryDirectory(prefix="capfilt-bench-") as folder:
        for number in range(2):
            make_shard(Path(folder) / f"{number:05d}.tar", 64, 640, 1000)
        augment = AugmentConfig(crop=(0.2, 1), flip=True, randaugment=(2, 5))
        config = LoaderConfig(batch_size=given.batch, shuffle=64, decoders=given.decoders, augment=augment)
        loader = Loader([Source(shards=folder)], config, made_up_words(WORDS), given.size, 0)
        if device.type == "cuda":
            loader.device = device
        found = measure(loader, device, given.batch, given.steps, given.rounds)
        print(json.dumps({**vars(given), **found, "operators/s": beside(loader, device, given.batch)}))


if __name__ == "__main__":
    main()
